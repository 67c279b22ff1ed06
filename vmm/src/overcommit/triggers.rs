//! Being told of pressure when it begins: PSI triggers (Documentation/accounting/psi.rst, "Monitoring
//! for pressure thresholds").
//!
//! A trigger is written into the pressure file of the host, and of our cgroup, and the kernel then
//! signals the descriptor when tasks have stood still for so long within a window: a second, or two
//! for who has no CAP_SYS_RESOURCE. A thread of its own waits for that and wakes the VMM thread, so
//! that the governor looks then and not at its next turn.
//!
//! ```text
//!  main thread: open ─► VMM thread, when there is something to govern: arm ─► thread "psi": epoll
//!                                                                                  │ EPOLLPRI
//!                       governor looks ◄── Message::Pressure (once until it is heard) ┘
//! ```
//! Where the kernel has no PSI, or refuses the trigger, the governor has its regular looks only, and
//! that is told once. Nothing is written into a file that is not the kernel's.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use devices::sandbox::{Allow, COMMON, Filter, SeccompMode, WORKER};
use devices::worker::STACK_BYTES;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::governor::PSI_BEGIN;
use super::psi::Paths;
use super::reading::{HostReading, Pressure};

/// The lists of the thread's filter.
pub const LISTS: [&[Allow]; 2] = [COMMON, WORKER];

/// Windows to try, in microseconds: who has no CAP_SYS_RESOURCE is allowed multiples of two
/// seconds only.
const WINDOWS_US: [u64; 2] = [1_000_000, 2_000_000];

const STOP: u64 = u64::MAX;

/// Whose pressure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All tasks of the host.
    Host,
    /// Those of our cgroup.
    Cgroup,
}

impl Scope {
    /// Its name in views and events.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Cgroup => "cgroup",
        }
    }

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// Whose pressure has passed the threshold since that was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressed(u8);

impl Pressed {
    /// Whether there was any.
    pub fn any(self) -> bool {
        self.0 != 0
    }

    /// As if that trigger had gone off.
    #[cfg(test)]
    pub fn of(scope: Scope) -> Self {
        Self(scope.bit())
    }

    /// Of both.
    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Adds what the kernel has told to a reading: averages over longer may not show it yet.
    pub fn raise(self, host: &mut HostReading) {
        for (scope, pressure) in [
            (Scope::Host, &mut host.pressure),
            (Scope::Cgroup, &mut host.cgroup_pressure),
        ] {
            if self.0 & scope.bit() != 0 {
                let known = pressure.get_or_insert(Pressure::default());
                known.some = known.some.max(PSI_BEGIN);
            }
        }
    }
}

/// Why a trigger could not be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Whose pressure goes unwatched.
    pub scope: Scope,
    /// Why.
    pub reason: String,
}

/// The open files, before anything is written to them.
#[derive(Debug)]
pub struct Triggers {
    files: Vec<(Scope, Result<File, String>)>,
    seccomp: SeccompMode,
}

impl Triggers {
    /// Opens the pressure files. Called on the main thread.
    pub fn open(paths: &Paths, seccomp: SeccompMode) -> Self {
        let mut files = vec![(Scope::Host, open(&paths.pressure))];
        files.extend(
            paths
                .cgroup_pressure
                .as_ref()
                .map(|path| (Scope::Cgroup, open(path))),
        );
        Self { files, seccomp }
    }

    /// Sets the triggers and starts the thread, which calls `wake` when it has something new to
    /// tell. Gives `None` where there is nothing to watch, and says what could not be set. Called
    /// on the VMM thread.
    pub fn arm(self, wake: impl Fn() + Send + 'static) -> (Option<Watcher>, Vec<Refused>) {
        let mut armed = Vec::new();
        let mut refused = Vec::new();
        for (scope, file) in self.files {
            let set = file.and_then(|mut file| {
                set(&mut file).map_err(|error| format!("the kernel takes no trigger: {error}"))?;
                Ok(file)
            });
            match set {
                Ok(file) => armed.push((scope, file.into())),
                Err(reason) => refused.push(Refused { scope, reason }),
            }
        }
        if armed.is_empty() {
            return (None, refused);
        }
        let scopes: Vec<Scope> = armed.iter().map(|(scope, _)| *scope).collect();
        match Watcher::start(armed, self.seccomp, wake) {
            Ok(watcher) => (Some(watcher), refused),
            Err(error) => {
                let reason = format!("starting the thread: {error}");
                refused.extend(scopes.into_iter().map(|scope| Refused {
                    scope,
                    reason: reason.clone(),
                }));
                (None, refused)
            }
        }
    }
}

fn open(path: &Path) -> Result<File, String> {
    let fail = |error: io::Error| format!("{}: {error}", path.display());
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.map_err(fail)?;
    let kind = rustix::fs::fstatfs(&file)
        .map_err(|e| fail(e.into()))?
        .f_type;
    if ![libc::PROC_SUPER_MAGIC, libc::CGROUP2_SUPER_MAGIC].contains(&kind) {
        return Err(format!("{}: is not the kernel's", path.display()));
    }
    Ok(file)
}

/// Writes the trigger, with the shortest window that is allowed.
fn set(file: &mut File) -> io::Result<()> {
    let mut result = Ok(());
    for window_us in WINDOWS_US {
        // The kernel puts the end of the string where the last byte was.
        let trigger = format!("some {} {window_us}\0", threshold_us(window_us));
        result = file.write_all(trigger.as_bytes());
        if result.is_ok() {
            break;
        }
    }
    result
}

/// How long tasks stand still in a window where the governor speaks of pressure.
fn threshold_us(window_us: u64) -> u64 {
    window_us * u64::from(PSI_BEGIN) / 10_000
}

/// The thread that waits for the kernel; ends when this is dropped.
#[derive(Debug)]
pub struct Watcher {
    scopes: Vec<&'static str>,
    pressed: Arc<AtomicU8>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Waits for files that signal urgent data (EPOLLPRI).
    fn start(
        files: Vec<(Scope, OwnedFd)>,
        seccomp: SeccompMode,
        wake: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let filter = Filter::compile("psi", seccomp, &LISTS).map_err(io::Error::other)?;
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let epoll = Epoll::new()?;
        let add = |descriptor, events, token| {
            epoll.ctl(
                ControlOperation::Add,
                descriptor,
                EpollEvent::new(events, token),
            )
        };
        add(stop.as_raw_fd(), EventSet::IN, STOP)?;
        for (index, (_, file)) in files.iter().enumerate() {
            // To poll takes the signal away; and a cgroup that is gone signals for ever.
            let events = EventSet::PRIORITY | EventSet::EDGE_TRIGGERED;
            add(file.as_raw_fd(), events, index as u64)?;
        }
        let pressed = Arc::new(AtomicU8::new(0));
        let scopes = files.iter().map(|(scope, _)| scope.name()).collect();
        let (installed, outcome) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("psi".to_owned())
            .stack_size(STACK_BYTES)
            .spawn({
                let pressed = pressed.clone();
                move || {
                    let result = filter.install();
                    let go = result.is_ok();
                    // The spawner waits for this, so it is there to hear it.
                    let _ = installed.send(result);
                    if go {
                        watch(&epoll, &files, &pressed, &wake);
                    }
                }
            })?;
        let watcher = Self {
            scopes,
            pressed,
            stop,
            thread: Some(thread),
        };
        match outcome.recv() {
            Ok(Ok(())) => Ok(watcher),
            Ok(Err(error)) => Err(io::Error::other(error)),
            Err(_) => Err(io::Error::other("it ended before its filter was in place")),
        }
    }

    /// One that nothing wakes any more, with something to tell.
    #[cfg(test)]
    pub fn having(pressed: Pressed) -> Self {
        Self {
            scopes: Vec::new(),
            pressed: Arc::new(AtomicU8::new(pressed.0)),
            stop: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            thread: None,
        }
    }

    /// Whose pressure is watched.
    pub fn scopes(&self) -> Vec<&'static str> {
        self.scopes.clone()
    }

    /// Whose pressure has passed the threshold since the last call.
    pub fn take(&self) -> Pressed {
        Pressed(self.pressed.swap(0, Ordering::SeqCst))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // Fails only when the counter is full, and then it ends anyway.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic aborts the process, so a join can't report one.
            let _ = thread.join();
        }
    }
}

fn watch(epoll: &Epoll, files: &[(Scope, OwnedFd)], pressed: &AtomicU8, wake: &dyn Fn()) {
    let mut events = [EpollEvent::default(); 4];
    loop {
        let ready = match epoll.wait(-1, &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(%error, "the overcommit policy is not told of pressure any more");
                return;
            }
        };
        for event in &events[..ready] {
            if event.data() == STOP {
                return;
            }
            let index = usize::try_from(event.data()).unwrap_or(usize::MAX);
            let Some((scope, file)) = files.get(index) else {
                continue;
            };
            if event.event_set().contains(EventSet::ERROR) {
                let scope = scope.name();
                tracing::warn!(scope, "the cgroup whose pressure was watched is gone");
                let none = EpollEvent::default();
                // Fails only for one that was never added.
                let _ = epoll.ctl(ControlOperation::Delete, file.as_raw_fd(), none);
                continue;
            }
            if pressed.fetch_or(scope.bit(), Ordering::SeqCst) == 0 {
                wake();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Duration;

    use rustix::net::{SendFlags, send};

    use super::*;

    /// Two ends; what is urgent at one makes the other signal as a trigger does.
    fn pair() -> (TcpStream, OwnedFd) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        near.set_nodelay(true).unwrap();
        (near, listener.accept().unwrap().0.into())
    }

    fn press(end: &TcpStream) {
        assert_eq!(send(end, b"!", SendFlags::OOB), Ok(1));
    }

    fn start(files: Vec<(Scope, OwnedFd)>) -> (Watcher, Receiver<()>) {
        let (sender, woken) = channel();
        let wake = move || sender.send(()).unwrap();
        let watcher = Watcher::start(files, SeccompMode::Enforce, wake).unwrap();
        (watcher, woken)
    }

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn pressure_wakes_once_until_it_is_asked_for_and_tells_whose_it_is() {
        let (host, host_file) = pair();
        let (cgroup, cgroup_file) = pair();
        let (watcher, woken) = start(vec![(Scope::Host, host_file), (Scope::Cgroup, cgroup_file)]);
        assert_eq!(watcher.scopes(), ["host", "cgroup"]);
        assert!(!watcher.take().any());
        press(&cgroup);
        woken.recv_timeout(LONG).unwrap();
        press(&host);
        let both = Scope::Host.bit() | Scope::Cgroup.bit();
        while watcher.pressed.load(Ordering::SeqCst) != both {
            std::thread::yield_now();
        }
        assert!(woken.try_recv().is_err(), "told already");
        assert_eq!(watcher.take(), Pressed(both));
        press(&cgroup);
        woken.recv_timeout(LONG).unwrap();
        assert_eq!(watcher.take(), Pressed(Scope::Cgroup.bit()));
        // It ends, and with it the last that could wake anybody.
        drop(watcher);
        assert!(woken.recv_timeout(LONG).is_err());
    }

    #[test]
    fn what_the_kernel_tells_is_in_the_reading_before_averages_show_it() {
        let mut host = HostReading::default();
        Pressed(0).raise(&mut host);
        assert_eq!(host, HostReading::default());
        host.cgroup_pressure = Some(Pressure {
            some: 9999,
            full: 1,
        });
        Pressed(3).raise(&mut host);
        let raised = |some, full| Some(Pressure { some, full });
        assert_eq!(host.pressure, raised(PSI_BEGIN, 0));
        assert_eq!(host.cgroup_pressure, raised(9999, 1), "more is more");
        assert_eq!(threshold_us(1_000_000), 100_000);
    }

    #[test]
    fn files_that_are_not_the_kernels_are_refused_and_nothing_is_written_to_them() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "some avg10=0.00").unwrap();
        let triggers = Triggers::open(
            &Paths {
                meminfo: "/proc/meminfo".into(),
                pressure: file.path().into(),
                cgroup_pressure: Some("/nowhere/memory.pressure".into()),
            },
            SeccompMode::Enforce,
        );
        let (watcher, refused) = triggers.arm(|| {});
        assert!(watcher.is_none());
        let scopes: Vec<Scope> = refused.iter().map(|r| r.scope).collect();
        assert_eq!(scopes, [Scope::Host, Scope::Cgroup]);
        assert!(refused[0].reason.contains("is not the kernel's"));
        assert!(
            refused[1]
                .reason
                .contains("/nowhere/memory.pressure: No such")
        );
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert_eq!(text, "some avg10=0.00");
        // One of the kernel's that takes no triggers: it can't be written at all.
        let version = File::open("/proc/version").map_err(|e| e.to_string());
        let triggers = Triggers {
            files: vec![(Scope::Host, version)],
            seccomp: SeccompMode::Enforce,
        };
        let (watcher, refused) = triggers.arm(|| {});
        assert!(watcher.is_none());
        assert!(
            refused[0].reason.contains("takes no trigger"),
            "{refused:?}"
        );
    }

    #[test]
    fn this_machines_kernel_takes_the_trigger_where_it_has_psi() {
        let paths = Paths::default();
        // Before Linux 6.5 it takes CAP_SYS_RESOURCE, which root in a container may lack.
        if open(&paths.pressure).is_err() {
            eprintln!("SKIPPED: this kernel has no PSI, or not for us");
            return;
        }
        let paths = Paths {
            cgroup_pressure: None,
            ..paths
        };
        let (watcher, refused) = Triggers::open(&paths, SeccompMode::Enforce).arm(|| {});
        assert_eq!(refused, []);
        assert_eq!(watcher.unwrap().scopes(), ["host"]);
    }
}
