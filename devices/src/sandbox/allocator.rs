//! One heap for all threads.
//!
//! glibc's malloc gives threads heaps of their own, and when it shrinks one for the first time it
//! opens `/proc/sys/vm/overcommit_memory`: in a sandboxed thread, some time after its start, that
//! is a violation. With a single heap it never does so. It also keeps the process smaller, and our
//! threads hardly allocate once they run.
#![expect(unsafe_code, reason = "no crate wraps mallopt")]

use std::sync::Once;

/// Has all threads that begin to allocate from now on share one heap. To be called before there
/// are others: at the start of the program, and in any case before a filter is installed.
pub fn share_one_heap() {
    static ONCE: Once = Once::new();
    // SAFETY: it sets a number within malloc, which takes its own lock. Where it is refused things
    // stay as they were.
    ONCE.call_once(|| unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    });
}
