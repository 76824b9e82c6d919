//! Statistics of samples, and the summary of a cell.
