//! What happens when a thread makes a call that its filter forbids: one line on standard error and
//! one event on the event monitor, both naming thread and call; then the process dies of SIGSYS.
//!
//! The filter's action is `SECCOMP_RET_TRAP`, so the kernel sends SIGSYS to the thread in place of
//! the call. Everything here runs in that signal's handler: no allocation, no locks.
#![expect(
    unsafe_code,
    reason = "a signal handler reads the kernel's siginfo and re-raises"
)]

use std::fmt::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Instant;

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::register_signal_handler;

use super::Sysno;

struct Report {
    start: Instant,
    event_monitor: Option<OwnedFd>,
}

static REPORT: OnceLock<Report> = OnceLock::new();

/// Installs the handler. Called once, by the main thread, before any filter is installed.
///
/// `event_monitor` gets the event; its time counts from `start`.
pub fn report_violations(start: Instant, event_monitor: Option<OwnedFd>) -> std::io::Result<()> {
    // A second call changes nothing.
    let _ = REPORT.set(Report {
        start,
        event_monitor,
    });
    register_signal_handler(libc::SIGSYS, handle).map_err(Into::into)
}

/// A line that does not fit is cut, never grown.
struct Line {
    bytes: [u8; 384],
    length: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for byte in text.bytes() {
            let Some(place) = self.bytes.get_mut(self.length) else {
                return Ok(());
            };
            *place = byte;
            self.length += 1;
        }
        Ok(())
    }
}

impl Line {
    fn write_to(format: std::fmt::Arguments<'_>, descriptor: impl AsFd) {
        let mut line = Line {
            bytes: [0; 384],
            length: 0,
        };
        let _ = line.write_fmt(format);
        // Nothing can be done about a failed write: the process is dying.
        let _ = rustix::io::write(descriptor, &line.bytes[..line.length]);
    }
}

/// A thread's name up to its first zero, fit to stand in a JSON string: it may come from a client,
/// and be cut in the middle of a character.
fn plain(name: &mut [u8]) -> &str {
    let length = name.iter().position(|byte| *byte == 0);
    let name = &mut name[..length.unwrap_or(0)];
    for byte in &mut *name {
        if !matches!(byte, b' '..=b'~') || matches!(byte, b'"' | b'\\' | b'{' | b'}') {
            *byte = b'?';
        }
    }
    std::str::from_utf8(name).unwrap_or("?")
}

extern "C" fn handle(_signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let mut name = [0u8; 17];
    // SAFETY: the kernel passes a valid siginfo to a SA_SIGINFO handler; for SIGSYS the system
    // call's number is the int at offset 24 (`_sigsys._syscall` in include/uapi/asm-generic/
    // siginfo.h on 64-bit), and the context is the ucontext of the interrupted call. PR_GET_NAME
    // writes at most 16 bytes.
    let (number, first, second) = unsafe {
        libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
        let registers = &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        (
            *info.cast::<c_int>().add(6),
            registers[libc::REG_RDI as usize],
            registers[libc::REG_RSI as usize],
        )
    };
    let thread = plain(&mut name);
    let call = usize::try_from(number)
        .ok()
        .and_then(Sysno::new)
        .map_or("unknown", |call| call.name());

    let stderr = rustix::stdio::stderr();
    Line::write_to(
        format_args!(
            "ballast: seccomp violation: thread={thread} syscall={call} number={number} \
             arguments={first:#x},{second:#x}\n"
        ),
        stderr,
    );
    if let Some(report) = REPORT.get()
        && let Some(monitor) = &report.event_monitor
    {
        let elapsed = report.start.elapsed();
        Line::write_to(
            format_args!(
                "{{\n  \"timestamp\": {{\n    \"secs\": {},\n    \"nanos\": {}\n  }},\n  \
                 \"source\": \"vmm\",\n  \"event\": \"seccomp-violation\",\n  \
                 \"properties\": {{\n    \"syscall\": \"{call}\",\n    \"thread\": \"{thread}\"\n  }}\n}}\n\n",
                elapsed.as_secs(),
                elapsed.subsec_nanos(),
            ),
            monitor,
        );
    }
    // The signal is blocked while its handler runs: it strikes, by default action, on return.
    // SAFETY: plain system calls with constant arguments; all are on every thread's list.
    unsafe {
        libc::signal(libc::SIGSYS, libc::SIG_DFL);
        libc::syscall(
            libc::SYS_tgkill,
            libc::getpid(),
            libc::gettid(),
            libc::SIGSYS,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_thread_name_breaks_the_event_that_names_it() {
        for (name, expected) in [
            (&b"vcpu0\0\0\0"[..], "vcpu0"),
            (b"NIC//a b_q1\0", "NIC//a b_q1"),
            (b"a\"b\\c{d}\x7f\0", "a?b?c?d??"),
            ("éé\0".as_bytes(), "????"),
            (b"\xc3\0", "?"),
            (b"\0", ""),
        ] {
            assert_eq!(plain(&mut name.to_vec()), expected);
        }
    }
}
