//! MSI-X: table, pending bits, masking.
