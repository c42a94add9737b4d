//! The look of tables on a terminal.

use comfy_table::{ContentArrangement, LineStyle, Table, TableStyle};

/// A rule under the header, nothing else: narrow, and easy to cut columns from.
const STYLE: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// An empty table with this header, which keeps to the terminal's width.
#[must_use]
pub fn table<S: AsRef<str>>(header: impl IntoIterator<Item = S>) -> Table {
    let mut table = Table::new();
    table
        .load_style(STYLE)
        .set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(header.into_iter().map(|h| h.as_ref().to_owned()));
    table
}
