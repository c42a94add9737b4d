//! Scratch memory, aligned to a cache line, whose allocation can fail without aborting.

use std::alloc::{Layout, alloc, dealloc};
use std::marker::PhantomData;
use std::ptr::NonNull;

use super::KernelError;

const ALIGN: usize = 64;

/// Uninitialised, cache-line-aligned room for `len` plain numbers.
pub(super) struct Buffer<T: Copy> {
    ptr: NonNull<T>,
    layout: Layout,
    marker: PhantomData<T>,
}

// SAFETY: the buffer owns its memory and T is a plain number, so it may move between threads.
unsafe impl<T: Copy + Send> Send for Buffer<T> {}
// SAFETY: sharing a buffer only gives out the raw pointer; who writes where is the kernels'
// contract (disjoint ranges per task).
unsafe impl<T: Copy + Sync> Sync for Buffer<T> {}

impl<T: Copy> Buffer<T> {
    /// Room for `len` numbers.
    pub(super) fn new(len: usize) -> Result<Self, KernelError> {
        let layout = Layout::array::<T>(len)
            .and_then(|l| l.align_to(ALIGN))
            .map_err(|_| KernelError::OutOfMemory { elements: len })?;
        if layout.size() == 0 {
            return Ok(Self {
                ptr: NonNull::dangling(),
                layout,
                marker: PhantomData,
            });
        }
        // SAFETY: the layout has a size above zero.
        let raw = unsafe { alloc(layout) };
        let ptr =
            NonNull::new(raw.cast::<T>()).ok_or(KernelError::OutOfMemory { elements: len })?;
        Ok(Self {
            ptr,
            layout,
            marker: PhantomData,
        })
    }

    pub(super) fn as_ptr(&self) -> *mut T {
        self.ptr.as_ptr()
    }
}

impl<T: Copy> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.layout.size() != 0 {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.ptr.as_ptr().cast(), self.layout) };
        }
    }
}
