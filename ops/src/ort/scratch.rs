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
