//! Interrupt delivery over KVM: irqfds and MSI routes.
