//! Columns for people.

/// The first row is the head.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    // A terminal takes orders; a pod's name is not to give any.
    let rows: Vec<[String; N]> = rows
        .iter()
        .map(|row| row.clone().map(|cell| cell.replace(char::is_control, "?")))
        .collect();
    let widths: Vec<usize> = (0..N)
        .map(|column| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths);
        let line: Vec<_> = cells
            .map(|(cell, &width)| format!("{cell:width$}"))
            .collect();
        text += line.join("  ").trim_end();
        text += "\n";
    }
    text
}
