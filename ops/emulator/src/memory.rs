//! Memory of one tensor, up to the end of a page.

use std::ffi::c_int;
use std::ptr;

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

unsafe extern "C" {
    fn lf_watch_tensor(base: u64, extent: usize, data: u64, bytes: usize, writable: c_int);
    fn lf_forget_tensor(base: u64);
}

/// Bytes that end, rounded up to 16, where a page ends; the page behind can't be touched. Filled with 0xff at first,
/// which is NaN in every element type.
#[derive(Debug)]
pub struct Memory {
    base: *mut u8,
    mapped: usize,
    data: *mut u8,
    len: usize,
}

impl Memory {
    /// Memory of `len` bytes for kernels to write, moved by `shift` bytes from an address that is a multiple of 16.
    ///
    /// # Panics
    /// If the system has no memory left.
    pub fn new(len: usize, shift: usize) -> Self {
        Self::map(len, shift, true)
    }

    fn map(len: usize, shift: usize, writable: bool) -> Self {
        let page = rustix::param::page_size();
        let used = (len + shift).next_multiple_of(16);
        let whole = used.next_multiple_of(page);
        let mapped = whole + page;
        // SAFETY: new memory; the protected page is part of it.
        unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            let base = mmap_anonymous(ptr::null_mut(), mapped, access, MapFlags::PRIVATE)
                .expect("memory for a tensor")
                .cast::<u8>();
            mprotect(base.add(whole).cast(), page, MprotectFlags::empty())
                .expect("a page that can't be touched");
            base.write_bytes(0xff, whole);
            let data = base.add(whole - used + shift);
            lf_watch_tensor(base as u64, mapped, data as u64, len, c_int::from(writable));
            Self {
                base,
                mapped,
                data,
                len,
            }
        }
    }

    /// Memory that holds these bytes, an input.
    pub fn of(bytes: &[u8], shift: usize) -> Self {
        let memory = Self::map(bytes.len(), shift, false);
        // SAFETY: as long as the bytes are.
        unsafe {
            memory
                .data
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
        };
        memory
    }

    /// Its address.
    pub fn address(&self) -> u64 {
        self.data as u64
    }

    /// What it holds now.
    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: mapped for as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }.to_vec()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; failing to unmap leaks, no more.
        unsafe {
            lf_forget_tensor(self.base as u64);
            let _ = munmap(self.base.cast(), self.mapped);
        }
    }
}
