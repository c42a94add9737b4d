//! Kernels on ONNX Runtime's own threads.

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use ort_sys::OrtKernelContext;

use super::OrtError;
use super::api::Api;
use crate::cpu::Pool;

/// ONNX Runtime's intra-op threads.
pub(super) struct OrtPool {
    api: Api,
    context: *const OrtKernelContext,
    failure: Mutex<Option<OrtError>>,
}

impl OrtPool {
    /// Threads for the node that runs in `context`.
    ///
    /// # Safety
    /// `context` must be the running node's, and the pool must not outlive the callback.
    pub(super) unsafe fn new(api: Api, context: *const OrtKernelContext) -> Self {
        Self {
            api,
            context,
            failure: Mutex::new(None),
        }
    }

    /// What went wrong in a task.
    pub(super) fn result(self) -> Result<(), OrtError> {
        let failure = self.failure.into_inner();
        failure
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(()), Err)
    }
}

// SAFETY: only the thread that runs the node uses `context`, in `run`; tasks reach `failure`,
// which is locked.
unsafe impl Sync for OrtPool {}

/// What a task finds behind its data pointer.
struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    failure: &'a Mutex<Option<OrtError>>,
}

impl Pool for OrtPool {
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        if count <= 1 {
            (0..count).for_each(task);
            return;
        }
        let job = Job {
            task,
            failure: &self.failure,
        };
        let data = (&raw const job).cast_mut().cast();
        // SAFETY: the job outlives the call, which returns when all tasks are done.
        let result = unsafe { self.api.parallel_for(self.context, run_task, count, data) };
        if let Err(error) = result {
            record(&self.failure, error);
        }
    }
}

unsafe extern "C" fn run_task(data: *mut c_void, index: usize) {
    // SAFETY: `OrtPool::run` passed a job that is still alive.
    let job = unsafe { &*data.cast::<Job<'_>>() };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (job.task)(index))) {
        record(job.failure, OrtError::panic(&*panic));
    }
}

fn record(place: &Mutex<Option<OrtError>>, error: OrtError) {
    let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
    place.get_or_insert(error);
}

impl OrtError {
    pub(super) fn panic(payload: &(dyn Any + Send)) -> Self {
        let message = payload
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "without a message".into());
        Self::Panic(message)
    }
}
