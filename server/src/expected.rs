//! A file with expected machines, as bytes of somebody else: what it is written in, and its rows.

use kiln_fleet::{At, Cells, Flaw, Flaws, Problem, Sheet, read_csv};
use std::borrow::Cow;
use std::collections::BTreeMap;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Longest CSV file, bytes: some 200 000 machines.
pub const CSV_LIMIT: usize = 32 << 20;
/// Longest TOML file, bytes: reading one takes ten times as much memory.
pub const TOML_LIMIT: usize = 8 << 20;

/// What a file is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Comma, semicolon or tab separated values.
    Csv,
    /// Tables `[[machine]]`, `[[sku]]` and `[[port]]`.
    Toml,
}

/// Reads a file's rows.
pub fn read(bytes: &[u8], format: Format) -> Result<Vec<Cells<'_>>, Flaws> {
    let limit = match format {
        Format::Csv => CSV_LIMIT,
        Format::Toml => TOML_LIMIT,
    };
    let syntax = |at, text: String| Flaws::one(at, Problem::Syntax(text));
    let first = At { line: 1, column: 1 };
    if bytes.len() > limit {
        let text =
            format!("the file has {} bytes of at most {limit}: split it, the rest of the list stays", bytes.len());
        return Err(syntax(first, text));
    }
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(syntax(first, "the file is UTF-16: save it as \"CSV UTF-8\"".into()));
    }
    let text = str::from_utf8(bytes).map_err(|e| {
        let before = String::from_utf8_lossy(&bytes[..e.valid_up_to()]);
        syntax(Places::new(&before).at(before.len()), "not UTF-8 from here on: save the file as \"CSV UTF-8\"".into())
    })?;
    match format {
        Format::Csv => read_csv(text),
        Format::Toml => read_toml(text),
    }
}

/// Lines and columns of a text.
struct Places<'a> {
    text: &'a str,
    lines: Vec<usize>,
}

impl<'a> Places<'a> {
    fn new(text: &'a str) -> Self {
        let starts = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        Self { text, lines: std::iter::once(0).chain(starts).collect() }
    }

    fn at(&self, offset: usize) -> At {
        let line = self.lines.partition_point(|start| *start <= offset).max(1);
        let start = self.lines[line - 1];
        let before = self.text.get(start..offset).unwrap_or_default();
        At { line, column: before.chars().count() + 1 }
    }
}

fn read_toml(text: &str) -> Result<Vec<Cells<'_>>, Flaws> {
    let places = Places::new(text);
    let one = |offset: usize, text: String| Flaws::one(places.at(offset), Problem::Syntax(text));
    let (document, errors) = DeTable::parse_recoverable(text);
    // The first mistake is the cause of those behind it.
    let place = |e: &toml::de::Error| e.span().map_or(0, |span| span.start);
    if let Some(first) = errors.iter().min_by_key(|e| place(e)) {
        return Err(one(place(first), first.message().trim_end().to_owned()));
    }
    let mut rows = Vec::new();
    for (name, value) in document.into_inner() {
        let start = name.span().start;
        let sheet = match &**name.get_ref() {
            "machine" => Sheet::Machine,
            "sku" => Sheet::Sku,
            "port" => Sheet::Port,
            other => {
                return Err(one(start, format!("{other:?} is not known: expected [[machine]], [[sku]] or [[port]]")));
            }
        };
        let DeValue::Array(tables) = value.into_inner() else {
            return Err(one(start, format!("write [[{}]], one for each", name.get_ref())));
        };
        for table in tables {
            let at = places.at(table.span().start);
            let DeValue::Table(table) = table.into_inner() else {
                return Err(one(start, format!("write [[{}]], one for each", name.get_ref())));
            };
            rows.push(Cells { at, sheet, cells: cells(sheet, table, &places)? });
        }
    }
    Ok(rows)
}

fn cells<'a>(
    sheet: Sheet,
    table: DeTable<'a>,
    places: &Places<'_>,
) -> Result<BTreeMap<&'static str, (At, Cow<'a, str>)>, Flaws> {
    let mut cells = BTreeMap::new();
    for (name, value) in table {
        let key = places.at(name.span().start);
        let Some(column) = sheet.column(name.get_ref()) else {
            let got = name.get_ref().chars().take(40).collect();
            return Err(Flaws::one(key, Problem::Column { got, known: sheet.columns().join(", ") }));
        };
        let at = places.at(value.span().start);
        let text = plain(value).ok_or_else(|| {
            let text = format!("{column}: expected a text, as {column} = \"…\"");
            Flaws { listed: vec![Flaw { at, problem: Problem::Syntax(text) }], more: 0 }
        })?;
        if cells.insert(column, (at, text)).is_some() {
            return Err(Flaws::one(key, Problem::ColumnTwice(column)));
        }
    }
    // An empty text says nothing, as an empty cell does.
    cells.retain(|_, (_, text)| !text.trim().is_empty());
    Ok(cells)
}

/// Texts, whole numbers, days; and lists of texts, for several addresses.
fn plain(value: Spanned<DeValue<'_>>) -> Option<Cow<'_, str>> {
    match value.into_inner() {
        DeValue::String(text) => Some(text),
        DeValue::Integer(number) => Some(Cow::Owned(number.as_str().to_owned())),
        DeValue::Datetime(day) => Some(Cow::Owned(day.to_string())),
        DeValue::Array(list) => {
            let texts: Option<Vec<Cow<'_, str>>> = list.into_iter().map(plain).collect();
            Some(Cow::Owned(texts?.join(" ")))
        }
        DeValue::Float(_) | DeValue::Boolean(_) | DeValue::Table(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_fleet::ExpectedList;

    const TOML: &str = "[[sku]]\nname = \"db\"\nmemory = \"4 x 32 GiB\"\n\n[[machine]]\nserial = \"ABC1\"\nunit = 14\n\
        sku = \"db\"\nexpected = 2026-11-20\nmac = [\"52:54:00:00:00:01\", \"52:54:00:00:00:02\"]\n\n\
        [[port]]\nswitch = \"s1\"\nport = \"3\"\nrack = \"A\"\nunit = \"U14\"\n";

    #[test]
    fn toml_and_csv_are_the_same_list() {
        let list = |text: &str, format| {
            let rows = read(text.as_bytes(), format).unwrap();
            ExpectedList::default().import(&rows, false, 5).unwrap().list
        };
        let toml = list(TOML, Format::Toml);
        let machine = toml.machine("ABC1").unwrap();
        assert_eq!(
            (machine.position.unit.as_str(), machine.macs.len(), machine.due.unwrap().to_string()),
            ("U14", 2, "2026-11-20".into())
        );
        let mut csv = ExpectedList::default();
        for text in [
            "sku,memory\ndb,4 x 32 GiB\n",
            "serial,unit,sku,expected,mac\nABC1,14,db,2026-11-20,52:54:00:00:00:01 52:54:00:00:00:02\n",
            "switch,port,rack,unit\ns1,3,A,14\n",
        ] {
            csv = csv.import(&read(text.as_bytes(), Format::Csv).unwrap(), false, 5).unwrap().list;
        }
        assert_eq!(toml, csv);
    }

    #[test]
    fn a_broken_file_is_named_with_line_and_column() {
        let fails = |text: &[u8], format, words: &str| {
            let said = read(text, format).unwrap_err().to_string();
            assert!(said.contains(words), "{said}");
        };
        let toml = |text: &str, words: &str| fails(text.as_bytes(), Format::Toml, words);
        toml("[[machine]]\nserial = \"A\nrack", "line 2, column 1");
        toml("[[machine]]\nserial = \"A\"\ncolour = \"red\"\n", "line 3, column 1: column \"colour\" is not known");
        toml("[[machine]]\nserial = true\n", "line 2, column 10: serial: expected a text");
        toml("[[rack]]\n", "line 1, column 3: \"rack\" is not known");
        toml("[machine]\nserial = \"A\"\n", "write [[machine]]");
        toml(&format!("x = \"{}\"", "x".repeat(TOML_LIMIT)), "split it");
        fails(b"serial,rack\nA,\xfcx\n", Format::Csv, "line 2, column 3: not UTF-8");
        fails(b"\xff\xfes\0", Format::Csv, "UTF-16");
        let rows = read("[[machine]]\nserial = \"A\"\nmemory = \"lots\"\n".as_bytes(), Format::Toml).unwrap();
        let said = ExpectedList::default().import(&rows, false, 5).unwrap_err().to_string();
        assert_eq!(
            said,
            "line 3, column 10: memory: \"lots\" is no size: expected a number with its unit, as \"32 GiB\" or \"960 GB\""
        );
    }
}
