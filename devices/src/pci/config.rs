//! A PCI device's configuration space: registers, write masks, BARs, capabilities.
