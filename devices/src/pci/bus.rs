//! The PCI bus: slots, ECAM, the 0xCF8/0xCFC ports, and the memory window in which BARs lie.
