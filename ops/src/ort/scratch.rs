//! Device memory for the time of one node's work.

use std::ffi::c_void;
use std::mem::offset_of;
use std::ptr;

use ort_sys::{OrtApi, OrtApiBase, OrtKernelContext, OrtMemoryInfo, OrtStatusPtr};

use super::OrtError;
use super::api::{Api, text};

/// `KernelContext_GetScratchBuffer`, which came with version 18 of the C API: memory of the session's arena that
/// belongs to the node's stream, so that freeing it right after the launches is safe: nobody but the same stream gets
/// it until that work is done. ONNX Runtime 1.17 has no such function, so CUDA needs 1.18.
///
/// Where the arena cannot grow, ONNX Runtime throws through this function instead of giving a status, and the process
/// ends. Asking its allocator first is no way out: without the stream's tag that takes other memory, and may grow the
/// arena while a CUDA graph is captured. A workspace is small (68 MB for 16 heads of 64 at 4M tokens) beside the tensors
/// that the graph allocated before it.
#[derive(Clone, Copy)]
pub(super) struct Scratch(GetScratchBuffer);

type GetScratchBuffer = unsafe extern "system" fn(
    *const OrtKernelContext,
    *const OrtMemoryInfo,
    usize,
    *mut *mut c_void,
) -> OrtStatusPtr;

impl Scratch {
    /// The function of an ONNX Runtime, if it is of release 1.18 or later.
    ///
    /// # Safety
    /// As for [`Api::from_base`].
    pub(super) unsafe fn from_base(base: *const OrtApiBase) -> Option<Self> {
        const VERSION: u32 = 18;
        // SAFETY: by the contract above. The bindings' table ends where the features of the build
        // make it end, so the function is found by its place: version 18 appended first one for
        // another provider, then this.
        unsafe {
            let base = base.as_ref()?;
            // Asking an older one for the table would make it write to the terminal.
            let release = text((base.GetVersionString)());
            let minor: u32 = release
                .strip_prefix("1.")?
                .split('.')
                .next()?
                .parse()
                .ok()?;
            if minor < VERSION {
                return None;
            }
            let table = (base.GetApi)(VERSION);
            if table.is_null() {
                return None;
            }
            let last = offset_of!(OrtApi, SessionOptionsAppendExecutionProvider_OpenVINO_V2);
            let place = table.byte_add(last + 2 * size_of::<usize>());
            Some(Self(place.cast::<GetScratchBuffer>().read()))
        }
    }

    /// Memory of the running node.
    ///
    /// # Safety
    /// As for [`Api::allocator`]; the node must be of a provider with a stream.
    pub(super) unsafe fn buffer(
        self,
        api: Api,
        context: *const OrtKernelContext,
        info: *const OrtMemoryInfo,
        bytes: usize,
    ) -> Result<*mut c_void, OrtError> {
        let mut buffer = ptr::null_mut();
        // SAFETY: by the contract above.
        api.check(unsafe { (self.0)(context, info, bytes, &mut buffer) })?;
        Ok(buffer)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use libloading::Library;

    use super::*;

    /// Every release in the folder of test libraries.
    fn libraries() -> Vec<PathBuf> {
        let Some(folder) = std::env::var_os("LINFUSION_TEST_ORT_DIR") else {
            println!("skipped: LINFUSION_TEST_ORT_DIR is not set");
            return Vec::new();
        };
        let releases = std::fs::read_dir(folder).unwrap().flatten();
        let files =
            releases.flat_map(|r| std::fs::read_dir(r.path()).into_iter().flatten().flatten());
        files
            .map(|f| f.path())
            .filter(|p| p.to_string_lossy().contains("libonnxruntime.so."))
            .collect()
    }

    #[test]
    fn the_function_is_at_its_place_in_every_release() {
        for path in libraries() {
            // SAFETY: ONNX Runtime, whose initialisers are harmless; it stays loaded.
            let base = unsafe {
                let library: &'static Library = Box::leak(Box::new(Library::new(&path).unwrap()));
                let get: libloading::Symbol<unsafe extern "system" fn() -> *const OrtApiBase> =
                    library.get(b"OrtGetApiBase").unwrap();
                get()
            };
            // SAFETY: what the library gave.
            let scratch = unsafe { Scratch::from_base(base) };
            let old = path.to_string_lossy().contains("so.1.17");
            assert_eq!(scratch.is_none(), old, "{}", path.display());
            let Some(Scratch(function)) = scratch else {
                continue;
            };
            // No bytes: the function looks at neither of the first two, and its neighbours would.
            let mut memory = ptr::dangling_mut();
            // SAFETY: see above.
            let status = unsafe { function(ptr::null(), ptr::null(), 0, &mut memory) };
            assert!(status.0.is_null() && memory.is_null(), "{}", path.display());
        }
    }
}
