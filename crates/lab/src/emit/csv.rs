//! `cells.csv`: one row a cell, in the order of the plan.

use crate::record::{COLUMNS, Record};

/// The table as text: the header, then one line a record, `\n` at the end of each.
pub fn to_string(records: &[Record]) -> String {
    let head: Vec<String> = COLUMNS.iter().map(|c| c.name.to_owned()).collect();
    table(&head, &records.iter().map(Record::fields).collect::<Vec<_>>())
}

/// Any table as text, quoted where needed; rows are as long as the header.
pub fn table(head: &[String], body: &[Vec<String>]) -> String {
    let mut writer =
        csv::WriterBuilder::new().terminator(csv::Terminator::Any(b'\n')).from_writer(Vec::new());
    // Writing into memory fails only for rows of unequal length.
    let mut written = writer.write_record(head);
    for row in body {
        written = written.and_then(|()| writer.write_record(row));
    }
    debug_assert!(written.is_ok(), "{written:?}");
    writer.into_inner().ok().and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default()
}
