//! What the main thread and the signal thread may ask of the kernel.
//!
//! The main thread has opened everything by the time it installs its filter: the listening socket,
//! the log, the event monitor, tokio's epoll and eventfd. It accepts, reads and writes; at the end
//! it removes its socket. It opens nothing, connects to nothing and spawns nothing.

use devices::allow;
use devices::sandbox::{Allow, COMMON, Test};

/// The main thread, beside [`devices::sandbox::COMMON`].
pub const MAIN: &[Allow] = {
    use libc::{
        AT_FDCWD, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, SOCK_CLOEXEC, SOCK_NONBLOCK,
    };
    &[
        allow!(accept4, 3 => Test::Is((SOCK_CLOEXEC | SOCK_NONBLOCK) as u32)),
        allow!(epoll_ctl, 1 => Test::Is(EPOLL_CTL_ADD as u32)),
        allow!(epoll_ctl, 1 => Test::Is(EPOLL_CTL_DEL as u32)),
        allow!(epoll_ctl, 1 => Test::Is(EPOLL_CTL_MOD as u32)),
        allow!(epoll_wait),
        // Wakes from other threads.
        allow!(read),
        // Requests, with the descriptors that come with them.
        allow!(recvmsg),
        // Answers: only to whom is connected already.
        allow!(sendto, 4 => Test::IsQword(0)),
        allow!(shutdown),
        // The API socket and its lock, at the end: whether it is still ours, and away.
        allow!(newfstatat, 0 => Test::Is(AT_FDCWD as u32)),
        allow!(unlinkat, 0 => Test::Is(AT_FDCWD as u32), 2 => Test::Is(0)),
    ]
};

/// The thread that waits for SIGTERM and SIGINT, beside [`devices::sandbox::COMMON`].
pub const SIGNALS: &[Allow] = &[allow!(rt_sigtimedwait)];

/// The kinds of thread that this crate runs, with the lists of their filters.
pub fn thread_kinds() -> Vec<(&'static str, Vec<&'static [Allow]>)> {
    vec![
        ("main", vec![COMMON, MAIN]),
        ("signal-handler", vec![COMMON, SIGNALS]),
    ]
}
