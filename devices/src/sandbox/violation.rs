//! What happens when a thread makes a call that its filter forbids: one line on standard error and
//! one event on the event monitor, both naming thread and call; then the process dies of SIGSYS.
