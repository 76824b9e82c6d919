//! One row of `cells.csv`, and the table of columns.
