//! The configuration file as a document with positions: reading it never stops at the first mistake.

use miette::{Diagnostic, LabeledSpan, NamedSource, SourceCode};
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// Bytes of the file that it is about.
    pub span: Range<usize>,
    /// What is wrong.
    pub message: String,
    /// What to write instead, where that is known.
    pub help: Option<String>,
}

/// Everything that is wrong with a file.
#[derive(Clone, Debug)]
pub struct Problems {
    /// In the order of the file.
    pub problems: Vec<Problem>,
    file: String,
    text: String,
}

#[derive(Debug)]
struct Shown<'a>(&'a Problem, NamedSource<String>);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.message)
    }
}

impl std::error::Error for Shown<'_> {}

impl Diagnostic for Shown<'_> {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.0.help.as_ref().map(|help| Box::new(help) as _)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        Some(&self.1)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        Some(Box::new(std::iter::once(LabeledSpan::new_with_span(None, self.0.span.clone()))))
    }
}

impl Problems {
    /// One problem with a file as a whole.
    pub fn whole(file: &str, message: impl Into<String>) -> Self {
        let problem = Problem { line: 1, column: 1, span: 0..0, message: message.into(), help: None };
        Self { problems: vec![problem], file: file.into(), text: String::new() }
    }

    /// The report for a person, with the lines concerned.
    pub fn report(&self, colour: bool) -> String {
        let theme = if colour { miette::GraphicalTheme::unicode() } else { miette::GraphicalTheme::none() };
        let handler = miette::GraphicalReportHandler::new_themed(theme).with_width(110);
        let mut report = String::new();
        for problem in &self.problems {
            let shown = Shown(problem, NamedSource::new(&self.file, self.text.clone()));
            report += &format!("{}:{}:{}", self.file, problem.line, problem.column);
            if handler.render_report(&mut report, &shown).is_err() {
                report += &problem.message;
            }
            report.push('\n');
        }
        report + &format!("{} in {}\n", count(self.problems.len(), "problem"), self.file)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Problem { line, column, message, help, .. } in &self.problems {
            write!(formatter, "{}:{line}:{column}: {message}", self.file)?;
            match help {
                Some(help) => writeln!(formatter, " ({help})")?,
                None => writeln!(formatter)?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// `1 problem`, `2 problems`.
pub fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// Collects problems while a document is read.
#[derive(Debug)]
pub struct Reader<'a> {
    file: &'a str,
    text: &'a str,
    problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    /// A reader of `text`.
    pub fn new(file: &'a str, text: &'a str) -> Self {
        Self { file, text, problems: Vec::new() }
    }

    /// Parses the document; mistakes of syntax are collected, and what could be understood is returned.
    pub fn document(&mut self) -> Spanned<DeTable<'a>> {
        let (document, errors) = DeTable::parse_recoverable(self.text);
        for error in errors {
            let span = error.span().unwrap_or(0..0);
            self.problem(span, error.message().to_owned(), None);
        }
        document
    }

    /// Notes a problem.
    pub fn problem(&mut self, span: Range<usize>, message: impl Into<String>, help: Option<String>) {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        self.problems.push(Problem { line, column, span, message: message.into(), help });
    }

    /// What was collected, or the value where there is nothing.
    pub fn finish<T>(mut self, value: T) -> Result<T, Problems> {
        if self.problems.is_empty() {
            return Ok(value);
        }
        self.problems.sort_by_key(|problem| (problem.span.start, problem.message.clone()));
        self.problems.dedup();
        Err(Problems { problems: self.problems, file: self.file.into(), text: self.text.into() })
    }
}

/// The nearest of `names` to `wanted`, if one is near.
pub fn nearest<'n>(wanted: &str, names: impl IntoIterator<Item = &'n str>) -> Option<String> {
    names
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(wanted, name), name))
        .filter(|(distance, name)| {
            let longer = name.len().max(wanted.len());
            *distance <= 1 + longer / 3 && *distance < longer
        })
        .min()
        .map(|(_, name)| format!("did you mean \"{name}\"?"))
}

/// What a value is, in words.
fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// A value with its position.
pub type Value<'a> = Spanned<DeValue<'a>>;

/// Reading values: each notes what is wrong and returns nothing.
impl Reader<'_> {
    fn expected<T>(&mut self, value: &Value<'_>, what: &str) -> Option<T> {
        self.problem(value.span(), format!("expected {what}, found {}", kind(value.get_ref())), None);
        None
    }

    /// A string.
    pub fn string(&mut self, value: &Value<'_>) -> Option<String> {
        match value.get_ref() {
            DeValue::String(text) => Some(text.to_string()),
            _ => self.expected(value, "a string"),
        }
    }

    /// True or false.
    pub fn boolean(&mut self, value: &Value<'_>) -> Option<bool> {
        match value.get_ref() {
            DeValue::Boolean(it) => Some(*it),
            _ => self.expected(value, "true or false"),
        }
    }

    /// A whole number within a range.
    pub fn number(&mut self, value: &Value<'_>, range: std::ops::RangeInclusive<u32>) -> Option<u32> {
        let DeValue::Integer(integer) = value.get_ref() else {
            return self.expected(value, "a whole number");
        };
        let number =
            i64::from_str_radix(integer.as_str(), integer.radix()).ok().and_then(|it| u32::try_from(it).ok());
        match number.filter(|number| range.contains(number)) {
            Some(number) => Some(number),
            None => {
                let message = format!("expected a number from {} to {}", range.start(), range.end());
                self.problem(value.span(), message, None);
                None
            }
        }
    }

    /// Something that is written as a string and parsed.
    pub fn parsed<T>(
        &mut self,
        value: &Value<'_>,
        what: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.string(value)?;
        let parsed = parse(&text);
        if parsed.is_none() {
            self.problem(value.span(), format!("\"{text}\" is not {what}"), None);
        }
        parsed
    }

    /// A list's items.
    pub fn list<'v, 'a>(&mut self, value: &'v Value<'a>) -> Vec<&'v Value<'a>> {
        match value.get_ref() {
            DeValue::Array(items) => items.iter().collect(),
            _ => self.expected(value, "a list").unwrap_or_default(),
        }
    }

    /// A table's fields.
    pub fn table<'v, 'a>(&mut self, value: &'v Value<'a>) -> Option<Fields<'v, 'a>> {
        match value.get_ref() {
            DeValue::Table(table) => Some(Fields::new(table, value.span())),
            _ => self.expected(value, "a table"),
        }
    }
}

/// The fields of a table; every field that is asked for is known, and the others are reported at the end.
#[derive(Debug)]
pub struct Fields<'v, 'a> {
    table: &'v DeTable<'a>,
    span: Range<usize>,
    known: BTreeSet<&'static str>,
}

impl<'v, 'a> Fields<'v, 'a> {
    /// The fields of `table`, which is at `span`.
    pub fn new(table: &'v DeTable<'a>, span: Range<usize>) -> Self {
        Self { table, span, known: BTreeSet::new() }
    }

    /// A field that may be missing.
    pub fn get(&mut self, name: &'static str) -> Option<&'v Value<'a>> {
        self.known.insert(name);
        self.table.get(name)
    }

    /// A field that may not.
    pub fn need(&mut self, reader: &mut Reader<'_>, name: &'static str) -> Option<&'v Value<'a>> {
        let value = self.get(name);
        if value.is_none() {
            reader.problem(self.span.clone(), format!("\"{name}\" is missing"), None);
        }
        value
    }

    /// A field that this version refuses to take and not obey.
    pub fn refuse(&mut self, reader: &mut Reader<'_>, name: &'static str, help: &str) {
        if let Some(value) = self.get(name) {
            let message = format!("this version does not have \"{name}\"");
            reader.problem(value.span(), message, Some(help.into()));
        }
    }

    /// The named tables below a field.
    pub fn named(
        &mut self,
        reader: &mut Reader<'_>,
        name: &'static str,
    ) -> Vec<(String, Range<usize>, Fields<'v, 'a>)> {
        let Some(value) = self.get(name) else { return Vec::new() };
        let Some(below) = reader.table(value) else { return Vec::new() };
        let mut named = Vec::new();
        for (key, value) in below.table {
            let text = key.get_ref().to_string();
            let legal = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            if text.is_empty() || text.len() > 63 || !text.chars().all(legal) {
                let message = format!("\"{text}\" is not a name: 1 to 63 letters, digits, - and _");
                reader.problem(key.span(), message, None);
            }
            if let Some(fields) = reader.table(value) {
                named.push((text, key.span(), fields));
            }
        }
        named
    }

    /// Zones and their addresses.
    pub fn pairs(&self) -> impl Iterator<Item = (String, Range<usize>, &'v Value<'a>)> {
        self.table.iter().map(|(key, value)| (key.get_ref().to_string(), key.span(), value))
    }

    /// Where the table is.
    pub fn span(&self) -> Range<usize> {
        self.span.clone()
    }

    /// Reports the fields that no one asked for.
    pub fn finish(self, reader: &mut Reader<'_>) {
        for (key, _) in self.table {
            let text: &str = key.get_ref();
            if !self.known.contains(text) {
                let help = nearest(text, self.known.iter().copied());
                reader.problem(key.span(), format!("unknown key \"{text}\""), help);
            }
        }
    }
}
