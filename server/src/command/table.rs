//! Tables for people: columns that line up, numbers to the right.

use serde_json::Value;

/// Rows of text under a heading.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
    right: Vec<bool>,
}

impl Table {
    /// A table with these columns. A name that begins with `>` is of a column of numbers.
    pub fn new<'a>(columns: impl IntoIterator<Item = &'a str>) -> Table {
        let mut right = Vec::new();
        let mut names = Vec::new();
        for name in columns {
            right.push(name.starts_with('>'));
            names.push(name.trim_start_matches('>').to_owned());
        }
        Table {
            rows: vec![names],
            right,
        }
    }

    /// Adds a row; it has a cell for each column.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().map(|cell| one_line(&cell)).collect();
        debug_assert_eq!(cells.len(), self.right.len());
        self.rows.push(cells);
    }

    /// True if there is nothing under the heading.
    pub fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }

    /// The lines, each with its end.
    pub fn render(&self) -> String {
        let mut widths = vec![0; self.right.len()];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (nth, cell) in row.iter().enumerate() {
                if nth > 0 {
                    line.push_str("  ");
                }
                let pad = " ".repeat(widths[nth] - cell.chars().count());
                if self.right[nth] {
                    line.push_str(&pad);
                    line.push_str(cell);
                } else {
                    line.push_str(cell);
                    line.push_str(&pad);
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Names and values below each other.
pub fn fields(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.chars().count()).max();
    let width = width.unwrap_or(0);
    let mut text = String::new();
    for (name, value) in rows {
        let value = value.replace('\n', &format!("\n{}", " ".repeat(width + 2)));
        text.push_str(&format!("{name:width$}  {value}"));
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

/// A cell for a JSON value: `-` for nothing.
pub fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(cell).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// Control characters would break the lines.
fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// `12,345`.
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_numbers_stand_to_the_right() {
        let mut table = Table::new(["NAME", ">COUNT", "NOTE"]);
        table.row(["a".into(), "7".into(), String::new()]);
        table.row(["größer".into(), "1200".into(), "x\ny".into()]);
        assert_eq!(
            table.render(),
            "NAME    COUNT  NOTE\na           7\ngrößer   1200  x y\n"
        );
    }

    #[test]
    fn a_long_value_is_set_in() {
        let text = fields(&[("a", "1".into()), ("long", "x\ny".into())]);
        assert_eq!(text, "a     1\nlong  x\n      y\n");
    }
}
