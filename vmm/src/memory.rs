//! Guest RAM: mapping it on the host, telling KVM.
