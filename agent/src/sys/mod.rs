//! The agent's only unsafe code: system calls that no safe wrapper covers. Each function checks its arguments and
//! returns the error the kernel gave.
#![allow(unsafe_code)]

mod disk;
mod guard;
mod ipmi;
mod kernel;
mod mapper;
mod net;

pub use disk::*;
pub use guard::*;
pub use ipmi::*;
pub use kernel::*;
pub use mapper::*;
pub use net::*;

use std::os::fd::RawFd;

/// For a child that lives on: one that hangs with a copy of every descriptor would hold the watchdog's, which takes a single
/// owner.
///
/// SAFETY: the caller vouches that nothing of this process uses another descriptor any more.
unsafe fn close_all_but(mut keep: [RawFd; 2]) {
    keep.sort_unstable();
    let mut from = 0;
    for fd in keep.map(RawFd::unsigned_abs) {
        if fd > from {
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
        }
        from = fd + 1;
    }
    unsafe { libc::syscall(libc::SYS_close_range, from, libc::c_uint::MAX, 0) };
}

/// SAFETY: the caller vouches that `arg` points to what `request` reads and writes.
unsafe fn raw_ioctl(fd: RawFd, request: libc::c_ulong, arg: *mut libc::c_void) -> libc::c_int {
    // musl and glibc differ in the type of `request`; its 32 bits are the same.
    #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::unnecessary_cast)]
    unsafe {
        libc::ioctl(fd, request as _, arg)
    }
}
