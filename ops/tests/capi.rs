//! The library through ONNX Runtime's bare C API, as a C or C++ host uses it: dlopen,
//! `OrtGetApiBase`, `RegisterCustomOpsLibrary_V2`.
//!
//! Needs `LINFUSION_TEST_ORT_DIR`: a folder with one folder per release that holds
//! `libonnxruntime.so*`. Without it the test that needs one does nothing but say so.

#[path = "support/host.rs"]
mod host;
#[path = "support/onnx_bytes.rs"]
mod onnx_bytes;

use std::ffi::{CStr, CString, c_char};
use std::ptr;

use host::{Host, our_library};
use linfusion_ops::body::{BodySpec, linfusion_attention_body, linfusion_attention_inline};
use linfusion_ops::ort::{RegisterCustomOps, register_in_process};
use linfusion_ops::{ElementType, Layout, LinFusionAttentionAttrs, reference};
use ndarray::ArrayD;
use onnx_bytes::{Form, OneNode, Site};
use ort_sys::{OrtApi, OrtApiBase, OrtErrorCode, OrtStatus, OrtStatusPtr};

const HEADS: usize = 4;
const WIDTHS: [usize; 2] = [40, 24];

fn model(form: Form, eps: Option<f32>) -> Vec<u8> {
    OneNode {
        opset: 17,
        layout: Layout::Packed,
        element: ElementType::F32,
        heads: HEADS as i64,
        site: Site::Linear { eps },
        widths: WIDTHS,
        form,
    }
    .encode()
}

const SPEC: BodySpec = BodySpec {
    opset: 17,
    layout: Layout::Packed,
    element: ElementType::F32,
};

fn function() -> Form {
    Form::Function(linfusion_attention_body(SPEC).unwrap())
}

fn inlined(eps: Option<f32>) -> Form {
    let attrs = LinFusionAttentionAttrs::new(HEADS as i64, eps).unwrap();
    Form::Inlined(linfusion_attention_inline(SPEC, attrs).unwrap())
}

fn inputs(queries: usize, keys: usize) -> [ArrayD<f32>; 3] {
    let fill = |rows: usize, width: usize, salt: usize| {
        ArrayD::from_shape_fn(vec![2, rows, HEADS * width], |at| {
            ((at[0] * 977 + at[1] * 31 + at[2] * 7 + salt) % 101) as f32 / 25.0 - 2.0
        })
    };
    [
        fill(queries, WIDTHS[0], 0),
        fill(keys, WIDTHS[0], 3),
        fill(keys, WIDTHS[1], 5),
    ]
}

fn assert_right(found: &[f32], [q, k, v]: [&ArrayD<f32>; 3], eps: Option<f32>) {
    let attrs = LinFusionAttentionAttrs::new(HEADS as i64, eps).unwrap();
    let exact = reference::linfusion_attention(q.view(), k.view(), v.view(), &attrs).unwrap();
    assert_eq!(found.len(), exact.len());
    for (f, e) in found.iter().zip(&exact) {
        assert!((f64::from(*f) - e).abs() < 2e-6, "{f}, not {e}");
    }
}

#[test]
fn every_release() {
    host::every_release();
}

#[test]
#[ignore = "run by `every_release` with LINFUSION_TEST_ORT_LIB"]
fn one_release() {
    let host = host::this_release();
    by_path_and_twice(&host);
    in_process(&host);
    without_the_library(&host);
    errors_name_the_node(&host);
    many_threads(&host);
}

fn by_path_and_twice(host: &Host) {
    let options = host.options();
    let path = CString::new(our_library().to_str().unwrap()).unwrap();
    for _ in 0..2 {
        // SAFETY: valid options and a path.
        host.check(unsafe {
            (host.api.RegisterCustomOpsLibrary_V2)(options, path.as_ptr().cast::<c_char>().cast())
        })
        .unwrap();
    }
    let [q, k, v] = inputs(70, 33);
    for (form, eps) in [(Form::Op, Some(0.5)), (function(), None)] {
        let session = host.session(&model(form, eps), options).unwrap();
        assert_right(&session.run([&q, &k, &v]).unwrap(), [&q, &k, &v], eps);
    }
}

fn in_process(host: &Host) {
    let options = host.options();
    for _ in 0..2 {
        // SAFETY: valid options and their table.
        unsafe { register_in_process(options, host.api) }.unwrap();
        // SAFETY: valid options and what OrtGetApiBase returned.
        host.check(unsafe { RegisterCustomOps(options, host.base) })
            .unwrap();
    }
    let session = host.session(&model(Form::Op, None), options).unwrap();
    let [q, k, v] = inputs(1, 700);
    assert_right(&session.run([&q, &k, &v]).unwrap(), [&q, &k, &v], None);
}

fn without_the_library(host: &Host) {
    let options = host.options();
    assert!(host.session(&model(Form::Op, None), options).is_err());
    let [q, k, v] = inputs(5, 9);
    for eps in [None, Some(0.25)] {
        for form in [function(), inlined(eps)] {
            let session = host.session(&model(form, eps), options).unwrap();
            assert_right(&session.run([&q, &k, &v]).unwrap(), [&q, &k, &v], eps);
        }
    }
}

fn errors_name_the_node(host: &Host) {
    let options = host.options();
    // SAFETY: valid options and their table.
    unsafe { register_in_process(options, host.api) }.unwrap();
    let session = host.session(&model(Form::Op, None), options).unwrap();
    let [q, k, _] = inputs(4, 6);
    let [_, _, short] = inputs(4, 5);
    let message = session.run([&q, &k, &short]).unwrap_err();
    for part in ["the_site", "number of keys", "= 6", "found 5"] {
        assert!(message.contains(part), "{message}");
    }
    let message = host
        .session(&model(Form::Op, Some(0.0)), options)
        .err()
        .unwrap();
    assert!(
        message.contains("the_site") && message.contains("`eps`"),
        "{message}"
    );
}

fn many_threads(host: &Host) {
    let options = host.options();
    // SAFETY: valid options and their table.
    unsafe { register_in_process(options, host.api) }.unwrap();
    let session = host.session(&model(Form::Op, None), options).unwrap();
    let [q, k, v] = inputs(300, 300);
    let expected = session.run([&q, &k, &v]).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for _ in 0..10 {
                    assert_eq!(session.run([&q, &k, &v]).unwrap(), expected);
                }
            });
        }
    });
}

/// An ONNX Runtime that knows the C API up to version 16 only gets a status that says so.
#[test]
fn an_old_release_gets_a_clear_status() {
    use std::sync::Mutex;
    static MESSAGE: Mutex<String> = Mutex::new(String::new());

    unsafe extern "system" fn create_status(
        _: OrtErrorCode,
        message: *const c_char,
    ) -> OrtStatusPtr {
        // SAFETY: the library passes a zero-terminated string.
        let text = unsafe { CStr::from_ptr(message) }
            .to_string_lossy()
            .into_owned();
        *MESSAGE.lock().unwrap() = text;
        OrtStatusPtr(ptr::dangling_mut::<OrtStatus>())
    }
    unsafe extern "system" fn get_api(version: u32) -> *const OrtApi {
        static TABLE: Mutex<usize> = Mutex::new(0);
        if version > 16 {
            return ptr::null();
        }
        let mut table = TABLE.lock().unwrap();
        if *table == 0 {
            let memory = Box::leak(Box::new(std::mem::MaybeUninit::<OrtApi>::zeroed()));
            // SAFETY: only the one field that the library may call is set and read.
            unsafe { (&raw mut (*memory.as_mut_ptr()).CreateStatus).write(create_status) };
            *table = memory.as_ptr() as usize;
        }
        *table as *const OrtApi
    }
    unsafe extern "system" fn version() -> *const c_char {
        c"1.16.3".as_ptr()
    }
    let base = OrtApiBase {
        GetApi: get_api,
        GetVersionString: version,
    };
    // SAFETY: the options are never reached.
    let status = unsafe { RegisterCustomOps(ptr::null_mut(), &base) };
    assert!(!status.0.is_null());
    let message = MESSAGE.lock().unwrap();
    assert!(
        message.contains("1.17 or later") && message.contains("1.16.3"),
        "{message}"
    );
}
