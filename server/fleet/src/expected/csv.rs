//! Comma-separated values as spreadsheets write them (RFC 4180): with or without a byte order mark, CRLF or LF, quotes,
//! and commas, semicolons or tabs. Every field knows where it stands, which is what a person with a broken file needs.
//!
//! One record at a time, borrowed from the text: memory does not grow with the file.

use super::At;
use std::borrow::Cow;

/// Most fields of a record.
pub const FIELDS: usize = 64;
/// Longest field, bytes.
pub const FIELD: usize = 1024;

/// A field, and where it begins.
pub type Field<'a> = (At, Cow<'a, str>);

/// A text that is no CSV.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum CsvError {
    #[error("a quoted field does not end: its closing quote is missing, or a quote within it is not doubled")]
    Open,
    #[error("{0:?} follows a closing quote: write \"\" for a quote within a quoted field")]
    AfterQuote(char),
    #[error("a quote within a field: put the whole field into quotes, and write \"\" for the quote")]
    QuoteWithin,
    #[error("more than {FIELDS} fields in a line")]
    TooManyFields,
    #[error("a field of more than {FIELD} bytes")]
    TooLong,
    #[error("a character {0:?} that no text has: is this a CSV file?")]
    Control(char),
}

/// Reads records, one after another.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a str,
    at: At,
    delimiter: char,
    failed: bool,
}

impl<'a> Reader<'a> {
    /// Of a whole file. The delimiter is the one that its first line has most of; a first line `sep=;` names it.
    pub fn new(text: &'a str) -> Self {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let first = text.split(['\n', '\r']).next().unwrap_or_default();
        let named =
            first.strip_prefix("sep=").and_then(|sep| sep.chars().next()).filter(|_| first.chars().count() == 5);
        let mut quoted = false;
        let mut counts = [(',', 0), (';', 0), ('\t', 0)];
        for c in first.chars() {
            quoted ^= c == '"';
            if let Some(count) = counts.iter_mut().find(|(delimiter, _)| *delimiter == c && !quoted) {
                count.1 += 1;
            }
        }
        // Of equals the comma.
        let most = counts.iter().rev().max_by_key(|(_, count)| *count).map_or(',', |(delimiter, _)| *delimiter);
        let mut reader =
            Self { rest: text, at: At { line: 1, column: 1 }, delimiter: named.unwrap_or(most), failed: false };
        if named.is_some() {
            reader.step(first.len());
            reader.end_of_line();
        }
        reader
    }

    /// Steps over bytes that hold no end of line.
    fn step(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.at.column += taken.chars().count();
        self.rest = rest;
        taken
    }

    /// Steps over CRLF, LF or CR, if one is next.
    fn end_of_line(&mut self) -> bool {
        let rest = self.rest.strip_prefix("\r\n").or_else(|| self.rest.strip_prefix(['\n', '\r']));
        if let Some(rest) = rest {
            self.rest = rest;
            self.at = At { line: self.at.line + 1, column: 1 };
        }
        rest.is_some()
    }

    fn field(&mut self) -> Result<Field<'a>, (At, CsvError)> {
        let at = self.at;
        if self.rest.starts_with('"') {
            return Ok((at, self.quoted(at)?));
        }
        let delimiter = self.delimiter;
        let end = self.rest.find([delimiter, '\n', '\r']).unwrap_or(self.rest.len());
        let text = self.step(end);
        if text.contains('"') {
            return Err((at, CsvError::QuoteWithin));
        }
        Ok((at, Cow::Borrowed(text)))
    }

    fn quoted(&mut self, at: At) -> Result<Cow<'a, str>, (At, CsvError)> {
        self.step(1);
        let mut text: Cow<'a, str> = Cow::Borrowed("");
        loop {
            let end = self.rest.find(['"', '\n', '\r']).ok_or((at, CsvError::Open))?;
            let piece = self.step(end);
            if text.is_empty() {
                text = Cow::Borrowed(piece);
            } else {
                text.to_mut().push_str(piece);
            }
            if text.len() > FIELD {
                return Err((at, CsvError::TooLong));
            }
            if self.end_of_line() {
                text.to_mut().push('\n');
            } else if self.rest.starts_with("\"\"") {
                self.step(2);
                text.to_mut().push('"');
            } else {
                self.step(1);
                return Ok(text);
            }
        }
    }

    fn record(&mut self) -> Result<Vec<Field<'a>>, (At, CsvError)> {
        let mut fields: Vec<Field<'a>> = Vec::new();
        loop {
            if fields.len() == FIELDS {
                return Err((self.at, CsvError::TooManyFields));
            }
            let (at, text) = self.field()?;
            if text.len() > FIELD {
                return Err((at, CsvError::TooLong));
            }
            if let Some(bad) = text.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\t')) {
                return Err((at, CsvError::Control(bad)));
            }
            fields.push((at, text));
            if self.rest.is_empty() || self.end_of_line() {
                return Ok(fields);
            }
            match self.rest.chars().next() {
                Some(c) if c == self.delimiter => drop(self.step(c.len_utf8())),
                Some(c) => return Err((self.at, CsvError::AfterQuote(c))),
                None => return Ok(fields),
            }
        }
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = Result<Vec<Field<'a>>, (At, CsvError)>;

    /// The next record that is not a blank line. After an error there is no more: where a field ends is not known.
    fn next(&mut self) -> Option<Self::Item> {
        while !self.failed && !self.rest.is_empty() {
            let record = self.record();
            self.failed = record.is_err();
            match record {
                Ok(fields) if fields.iter().all(|(_, text)| text.trim().is_empty()) => {}
                record => return Some(record),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Vec<Vec<String>> {
        Reader::new(text).map(|r| r.unwrap().into_iter().map(|(_, text)| text.into_owned()).collect()).collect()
    }

    #[test]
    fn what_spreadsheets_write_is_the_same() {
        let expected = vec![vec!["serial".to_owned(), "rack".into()], vec!["A1, b".into(), "say \"x\"\ny".into()]];
        for text in [
            "serial,rack\n\"A1, b\",\"say \"\"x\"\"\ny\"\n",
            "\u{feff}serial;rack\r\n\"A1, b\";\"say \"\"x\"\"\r\ny\"\r\n\r\n",
            "sep=;\r\nserial;rack\r\n\"A1, b\";\"say \"\"x\"\"\r\ny\"",
            "serial\track\r\"A1, b\"\t\"say \"\"x\"\"\ry\"\r,\r",
        ] {
            let got: Vec<Vec<String>> = read(text).into_iter().filter(|r| r.len() == 2).collect();
            assert_eq!(got, expected, "{text:?}");
        }
    }

    #[test]
    fn a_broken_field_is_named_with_its_place() {
        let fails = |text: &str| Reader::new(text).find_map(Result::err).unwrap();
        let at = |line, column| At { line, column };
        assert_eq!(fails("a,b\n1,\"x\n"), (at(2, 3), CsvError::Open));
        assert_eq!(fails("a,b\n\"x\"y,1\n"), (at(2, 4), CsvError::AfterQuote('y')));
        assert_eq!(fails("a,b\n1,x\"y\n"), (at(2, 3), CsvError::QuoteWithin));
        assert_eq!(fails("a,b\n1,\u{0}\n"), (at(2, 3), CsvError::Control('\u{0}')));
        assert_eq!(fails(&format!("a\n{}", "x".repeat(FIELD + 1))).1, CsvError::TooLong);
        assert_eq!(fails(&format!("a\n\"{}\"", "x\n".repeat(FIELD))).1, CsvError::TooLong);
        assert_eq!(fails(&",".repeat(FIELDS)).1, CsvError::TooManyFields);
    }

    proptest! {
        #[test]
        fn whatever_is_quoted_comes_back(
            rows in prop::collection::vec(prop::collection::vec("[ -~äß;,\"]{0,20}", 3), 1..6),
            semicolon: bool, crlf: bool,
        ) {
            let (delimiter, end) = (if semicolon { ";" } else { "," }, if crlf { "\r\n" } else { "\n" });
            let quote = |field: &String| format!("\"{}\"", field.replace('"', "\"\""));
            let line = |row: &Vec<String>| row.iter().map(quote).collect::<Vec<_>>().join(delimiter);
            let heading = ["a", "b", "c"].join(delimiter);
            let text = format!("{heading}{end}{}", rows.iter().map(line).collect::<Vec<_>>().join(end));
            let filled: Vec<Vec<String>> =
                rows.into_iter().filter(|row| row.iter().any(|field| !field.trim().is_empty())).collect();
            prop_assert_eq!(&read(&text)[1..], &filled[..]);
        }

        #[test]
        fn any_text_ends(text in "\\PC{0,200}|[\",;\r\n\t a]{0,200}") {
            let records = Reader::new(&text).count();
            prop_assert!(records <= text.len());
        }
    }
}
