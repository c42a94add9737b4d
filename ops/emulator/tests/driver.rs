//! The launch code against a driver that runs launches in the emulator: the calls it makes, their order, and what
//! becomes of failures. One test a process, since the driver's library and its contexts are the process's.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::process::Command;

use half::f16;
use libloading::Library;
use linfusion_cuda_emulator::{FAKE_DRIVER, Memory};
use linfusion_ops::cuda::driver::{CudaError, Gpu, Stream, version};
use linfusion_ops::cuda::plan::{Addresses, Launch, LinearPlan};
use linfusion_ops::reference::linfusion_attention;
use linfusion_ops::{Dims, ElementType, LinFusionAttentionAttrs};
use ndarray::ArrayD;

/// An archive of one image for compute capability 9.0: an empty zlib stream. The fake driver never looks into it.
static KERNELS: [u8; 28] = *b"LFKERN01\x01\0\0\0c\x09\0\0\x08\0\0\0\x78\x9c\x03\0\0\0\0\x01";

/// The fake driver's own functions.
struct Fake(&'static Library);

impl Fake {
    fn load() -> Self {
        // SAFETY: loading it runs no code but the kernels' registration.
        let library = unsafe { Library::new(FAKE_DRIVER) }.unwrap();
        Self(Box::leak(Box::new(library)))
    }

    fn calls(&self) -> Vec<String> {
        // SAFETY: the function's type; the string lives until the next call on this thread.
        let text = unsafe {
            let calls = self
                .0
                .get::<unsafe extern "C" fn() -> *const c_char>(b"fake_calls\0")
                .unwrap();
            CStr::from_ptr(calls()).to_str().unwrap()
        };
        text.lines().map(str::to_owned).collect()
    }

    fn stream(&self, device: c_int) -> Stream {
        // SAFETY: the function's type.
        unsafe {
            let stream = self
                .0
                .get::<unsafe extern "C" fn(c_int) -> *mut c_void>(b"fake_stream\0")
                .unwrap();
            Stream(stream(device))
        }
    }

    fn fail(&self, function: &str, result: c_int) {
        let name = CString::new(function).unwrap();
        // SAFETY: the function's type; the name is copied.
        unsafe {
            let fail = self
                .0
                .get::<unsafe extern "C" fn(*const c_char, c_int)>(b"fake_fail\0")
                .unwrap();
            fail(name.as_ptr(), result);
        }
    }

    fn capability(&self, major: c_int, minor: c_int) {
        // SAFETY: the function's type.
        unsafe {
            let set = self
                .0
                .get::<unsafe extern "C" fn(c_int, c_int)>(b"fake_capability\0")
                .unwrap();
            set(major, minor);
        }
    }

    fn depth(&self) -> c_int {
        // SAFETY: the function's type.
        unsafe {
            let depth = self
                .0
                .get::<unsafe extern "C" fn() -> c_int>(b"fake_depth\0")
                .unwrap();
            depth()
        }
    }
}

/// A call of LinFusionAttention: its memory, plan and exact result.
struct Case {
    memory: [Memory; 5],
    launches: Vec<Launch>,
    exact: ArrayD<f64>,
}

impl Case {
    fn new(gpu: &Gpu, tokens: usize, width: usize) -> Self {
        let shape = [1, tokens, 2 * width];
        let tensor = |salt: usize| {
            ArrayD::from_shape_fn(&shape[..], |at| {
                f16::from_f64(((at[1] * 7 + at[2] * 3 + salt) % 23) as f64 / 8.0 - 1.25)
            })
        };
        let [q, k, v] = [0, 5, 11].map(tensor);
        let attrs = LinFusionAttentionAttrs {
            num_heads: 2,
            eps: 1e-4,
        };
        let dims = Dims::new(q.shape(), k.shape(), v.shape(), &attrs).unwrap();
        let exact = linfusion_attention(q.view(), k.view(), v.view(), &attrs).unwrap();
        let plan = LinearPlan::new(&dims, ElementType::F16, attrs.eps, true, gpu.device()).unwrap();
        let bytes = |x: &ArrayD<f16>| x.iter().flat_map(|x| x.to_ne_bytes()).collect::<Vec<_>>();
        let memory = [
            Memory::of(&bytes(&q), 0),
            Memory::of(&bytes(&k), 0),
            Memory::of(&bytes(&v), 0),
            Memory::new(q.len() * 2, 0),
            Memory::new(plan.workspace_bytes(), 0),
        ];
        let [q, k, v, out, workspace] = memory.each_ref().map(Memory::address);
        let launches = plan.launches(&Addresses {
            q,
            k,
            v,
            out,
            workspace,
        });
        Self {
            memory,
            launches,
            exact,
        }
    }

    fn run(&self, gpu: &Gpu, stream: Stream) -> Result<(), CudaError> {
        // SAFETY: the memory is as large as the plan says.
        unsafe { gpu.launch(stream, &self.launches) }
    }

    fn assert_right(&self) {
        let out = self.memory[3].bytes();
        let found = out
            .chunks_exact(2)
            .map(|b| f16::from_ne_bytes([b[0], b[1]]).to_f64());
        for (found, exact) in found.zip(&self.exact) {
            assert!((found - exact).abs() < 4e-3, "{found}, not {exact}");
        }
    }
}

fn gpu(stream: Stream) -> Result<&'static Gpu, CudaError> {
    // SAFETY: a stream of the fake driver, which never reads the image.
    unsafe { Gpu::of_stream(stream, &KERNELS) }
}

fn launches_run_on_the_stream_in_its_context() {
    let fake = Fake::load();
    assert_eq!(version(), Ok((13, 0)));
    let stream = fake.stream(1);
    let device = gpu(stream).unwrap();
    assert_eq!(device.device().capability, (9, 0));
    assert_eq!(device.device().multiprocessors, 4);
    // Loaded once, with the context current; found again without.
    assert_eq!(
        fake.calls(),
        [
            "cuDriverGetVersion",
            "cuStreamGetCtx",
            "cuCtxPushCurrent 1",
            "cuCtxGetDevice",
            "cuDeviceGetAttribute",
            "cuDeviceGetAttribute",
            "cuDeviceGetAttribute",
            "cuDeviceGetAttribute",
            "cuModuleLoadData 1",
            "cuCtxPopCurrent",
        ]
    );
    assert!(std::ptr::eq(gpu(stream).unwrap(), device));
    assert_eq!(fake.calls(), ["cuStreamGetCtx"]);

    let case = Case::new(device, 1200, 64);
    case.run(device, stream).unwrap();
    case.assert_right();
    let first = fake.calls();
    let launched: Vec<&String> = first
        .iter()
        .filter(|c| c.starts_with("cuLaunchKernel"))
        .collect();
    assert_eq!(
        launched,
        [
            "cuLaunchKernel linfusion_state_f16_d64",
            "cuLaunchKernel linfusion_reduce_f16",
            "cuLaunchKernel linfusion_apply_f16_d64"
        ]
    );
    assert_eq!(
        first.first().map(String::as_str),
        Some("cuCtxPushCurrent 1")
    );
    assert_eq!(first.last().map(String::as_str), Some("cuCtxPopCurrent"));
    assert!(
        first
            .iter()
            .any(|c| c.starts_with("cuFuncSetAttribute linfusion_state_f16_d64")),
        "{first:?}"
    );

    // Functions and their shared memory are asked for once.
    case.run(device, stream).unwrap();
    let again = fake.calls();
    assert_eq!(again.len(), 5, "{again:?}");
    assert_eq!(fake.depth(), 0);

    // The other device has its own module.
    let other = gpu(fake.stream(0)).unwrap();
    assert!(fake.calls().contains(&"cuModuleLoadData 0".to_owned()));
    let case = Case::new(other, 100, 40);
    case.run(other, fake.stream(0)).unwrap();
    case.assert_right();
}

fn failures_are_told_and_leave_no_context_behind() {
    let fake = Fake::load();
    fake.capability(8, 6);
    let error = gpu(fake.stream(0)).err().unwrap().to_string();
    let expected = "found compute capability 8.6, the kernels are for 9.0";
    assert!(error.contains(expected), "{error}");
    fake.capability(9, 0);
    fake.fail("cuModuleLoadData", 209);
    let error = gpu(fake.stream(0)).err().unwrap().to_string();
    for part in ["CUDA 13.0", "CUDA_ERROR_NO_BINARY_FOR_GPU", "update"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(fake.depth(), 0);
    fake.fail("cuModuleLoadData", 2);
    let error = gpu(fake.stream(0)).err().unwrap().to_string();
    assert_eq!(
        error,
        "cuModuleLoadData failed: CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    );
    // A failure is not remembered.
    fake.fail("", 0);
    let device = gpu(fake.stream(0)).unwrap();

    let case = Case::new(device, 60, 40);
    fake.fail("cuLaunchKernel", 719);
    let error = case.run(device, fake.stream(0)).unwrap_err().to_string();
    assert!(
        error.contains("cuLaunchKernel failed: CUDA_ERROR_LAUNCH_FAILED"),
        "{error}"
    );
    assert_eq!(fake.depth(), 0);
    // An error that the driver has no name for.
    fake.fail("cuLaunchKernel", 998);
    let error = case.run(device, fake.stream(0)).unwrap_err().to_string();
    assert!(error.contains("error 998"), "{error}");
    fake.fail("", 0);
    let mut unknown = case.launches[0].clone();
    unknown.kernel = "linfusion_unknown".into();
    // SAFETY: never launched.
    let error = unsafe { device.launch(fake.stream(0), &[unknown]) }
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND"),
        "{error}"
    );
    assert_eq!(
        gpu(Stream(std::ptr::null_mut())).err(),
        Some(CudaError::NoContext)
    );
    // SAFETY: as above.
    assert!(unsafe { Gpu::current(&KERNELS) }.unwrap().is_none());
    case.run(device, fake.stream(0)).unwrap();
    case.assert_right();
}

fn threads_share_a_context() {
    let fake = Fake::load();
    let streams = [fake.stream(0).0 as usize, fake.stream(1).0 as usize];
    std::thread::scope(|scope| {
        for thread in 0..6 {
            scope.spawn(move || {
                let stream = Stream(streams[thread % 2] as *mut c_void);
                let device = gpu(stream).unwrap();
                for width in [40, 48, 64] {
                    let case = Case::new(device, 90 + thread, width);
                    case.run(device, stream).unwrap();
                    case.assert_right();
                }
            });
        }
    });
    let loads = fake
        .calls()
        .iter()
        .filter(|c| c.starts_with("cuModuleLoadData"))
        .count();
    assert_eq!(loads, 2);
}

/// A machine with a driver has one; elsewhere its absence is told.
fn the_absence_of_a_driver_is_told() {
    // SAFETY: as the library does.
    if unsafe { Library::new("libcuda.so.1") }.is_err() {
        assert_eq!(version(), Err(CudaError::NoDriver));
        assert_eq!(
            gpu(Stream(std::ptr::null_mut())).err(),
            Some(CudaError::NoDriver)
        );
    }
}

const CASES: [(&str, fn()); 4] = [
    ("launches", launches_run_on_the_stream_in_its_context),
    ("failures", failures_are_told_and_leave_no_context_behind),
    ("threads", threads_share_a_context),
    ("absence", the_absence_of_a_driver_is_told),
];

const CASE: &str = "LINFUSION_DRIVER_CASE";

/// Runs every case in a process of its own.
#[test]
fn every_case() {
    let mut failures = vec![];
    for (name, _) in CASES {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["one_case", "--exact", "--ignored", "--nocapture"])
            .env(CASE, name)
            .output()
            .unwrap();
        if !output.status.success() {
            failures.push(format!(
                "{name}: {}",
                String::from_utf8_lossy(&output.stderr)
            ));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
#[ignore = "run by `every_case`"]
fn one_case() {
    let name = std::env::var(CASE).unwrap();
    let (_, case) = CASES.iter().find(|(n, _)| *n == name).unwrap();
    case();
}
