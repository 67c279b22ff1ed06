//! One heap for all threads, and nothing left for malloc to look up once a filter is in place.
//!
//! glibc's malloc gives threads heaps of their own, and when it shrinks one for the first time it
//! opens `/proc/sys/vm/overcommit_memory` (`check_may_shrink_heap`): rarely, at any time, in any
//! thread, and in a sandboxed one that is a violation. With a single heap it never does. One heap
//! also keeps the process smaller, and our threads hardly allocate once they run.
#![expect(unsafe_code, reason = "no crate wraps mallopt")]

use std::sync::Once;

static SETTLED: Once = Once::new();

/// Has all threads share the heap of the first. For the start of `main`, while there is no other
/// thread.
pub fn share_one_heap() {
    SETTLED.call_once(limit_heaps);
}

/// The same where threads may have heaps of their own already, as in tests: has one of them shrink
/// now, which is looked up once in a process. Called before any filter is installed; costs
/// milliseconds, and nothing after [`share_one_heap`].
pub(super) fn settle() {
    SETTLED.call_once(|| {
        // Enough for it to shrink. Not 2 MiB: what a heap has grown to stays mapped, begins at a
        // huge page's boundary, and is used again by the next thread; where the host gives
        // transparent huge pages to all (Debian does), that thread's first touch cost 2 MiB.
        let churn = || {
            drop(std::hint::black_box(
                [(); 24].map(|()| Vec::<u8>::with_capacity(32 << 10)),
            ));
        };
        // Without a thread there is nothing to settle.
        if let Ok(thread) = std::thread::Builder::new().spawn(churn) {
            let _ = thread.join();
        }
        limit_heaps();
    });
}

fn limit_heaps() {
    // SAFETY: it sets a number within malloc, which takes its own lock. Where it is refused things
    // stay as they were.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
