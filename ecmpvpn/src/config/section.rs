//! One TOML table: checks its keys against the known ones, and reads each value with a parser.
//!
//! A parser returns the value, or a phrase that continues `KEY in [SECTION]`. Only parsers of values that are not
//! secret quote the value in the phrase.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

use toml::de::{DeTable, DeValue};

use super::problems::Collector;

/// A value, or a phrase that says what is wrong with it.
pub(super) type Parsed<T> = Result<T, String>;

/// A value and its byte offset in the text.
#[derive(Clone, Debug)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) at: usize,
}

/// Drops the offsets.
pub(super) fn values<T>(found: Vec<At<T>>) -> Vec<T> {
    found.into_iter().map(|found| found.value).collect()
}

pub(super) struct Section<'a> {
    label: &'static str,
    table: &'a DeTable<'a>,
    /// Known keys that are probably misspelt: the unknown key is reported already, so their absence is not.
    misspelt: Vec<String>,
    at: usize,
    collector: &'a Collector<'a>,
}

impl<'a> Section<'a> {
    /// Reports the keys of `table` that are not among `known`.
    pub(super) fn new(
        label: &'static str,
        table: &'a DeTable<'a>,
        at: usize,
        known: &[&str],
        collector: &'a Collector<'a>,
    ) -> Self {
        let mut misspelt = Vec::new();
        for key in table.keys() {
            let name = key.get_ref().as_ref();
            if known.contains(&name) {
                continue;
            }
            let place = if label.is_empty() { String::new() } else { format!(" in {label}") };
            let fix = match nearest(name, known) {
                Some(nearest) => {
                    misspelt.push(nearest.to_owned());
                    format!("did you mean {nearest:?}?")
                }
                None => format!("known here are {}", known.join(", ")),
            };
            collector.add(key.span().start, format!("unknown key {name:?}{place}: {fix}"));
        }
        Self { label, table, misspelt, at, collector }
    }

    /// A section that is missing from the document; `table` is empty.
    pub(super) fn absent<'b>(&self, label: &'static str, table: &'b DeTable<'b>) -> Section<'b>
    where
        'a: 'b,
    {
        Section { label, table, misspelt: Vec::new(), at: 0, collector: self.collector }
    }

    /// Reports a problem with the value at `at` of `key`.
    pub(super) fn report(&self, key: &str, at: usize, phrase: &str) {
        if self.label.is_empty() {
            self.collector.add(at, format!("{key} {phrase}"));
        } else {
            self.collector.add(at, format!("{key} in {} {phrase}", self.label));
        }
    }

    /// Reports a problem with the table as a whole.
    pub(super) fn report_whole(&self, phrase: &str) {
        self.collector.add(self.at, format!("{} {phrase}", self.label));
    }

    /// Whether `key` is present, even if misspelt.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key) || self.misspelt.iter().any(|misspelt| misspelt == key)
    }

    /// The value of `key`. `None` if it is absent, or invalid (then it is reported).
    pub(super) fn get<T>(&self, key: &str, parse: impl Fn(&DeValue<'a>) -> Parsed<T>) -> Option<At<T>> {
        let value = self.table.get(key)?;
        self.parse(key, value, parse)
    }

    /// Like [`Self::get`]; also reports the absence of `key`.
    pub(super) fn need<T>(&self, key: &str, example: &str, parse: impl Fn(&DeValue<'a>) -> Parsed<T>) -> Option<At<T>> {
        if !self.has(key) {
            self.report_whole(&format!("has no {key}: add a line such as `{key} = {example}`"));
        }
        self.get(key, parse)
    }

    /// The value of `key`. `default` if it is absent, or invalid (then it is reported).
    pub(super) fn or<T>(&self, key: &str, default: T, parse: impl Fn(&DeValue<'a>) -> Parsed<T>) -> T {
        self.get(key, parse).map_or(default, |found| found.value)
    }

    /// The valid elements of a list; the others are reported. Empty if `key` is absent.
    pub(super) fn list<T>(&self, key: &str, max: usize, parse: impl Fn(&DeValue<'a>) -> Parsed<T>) -> Vec<At<T>> {
        let Some(value) = self.table.get(key) else { return Vec::new() };
        let DeValue::Array(array) = value.get_ref() else {
            self.report(key, value.span().start, &format!("must be a list, not {}", kind(value.get_ref())));
            return Vec::new();
        };
        if array.len() > max {
            self.report(key, value.span().start, &format!("has {} elements: give at most {max}", array.len()));
        }
        array.iter().take(max).filter_map(|element| self.parse(key, element, &parse)).collect()
    }

    /// The table below `key`.
    pub(super) fn table(&self, key: &str, label: &'static str, known: &[&str]) -> Option<Section<'a>> {
        let value = self.table.get(key)?;
        let at = value.span().start;
        if let DeValue::Table(table) = value.get_ref() {
            Some(Section::new(label, table, at, known, self.collector))
        } else {
            self.report(key, at, &format!("must be a table, not {}", kind(value.get_ref())));
            None
        }
    }

    /// The array of tables below `key`, at most `max` of them.
    pub(super) fn tables(&self, key: &str, label: &'static str, known: &[&str], max: usize) -> Vec<Section<'a>> {
        let Some(value) = self.table.get(key) else { return Vec::new() };
        let at = value.span().start;
        let DeValue::Array(array) = value.get_ref() else {
            self.report(key, at, &format!("must be written as {label}"));
            return Vec::new();
        };
        if array.len() > max {
            self.collector.add(at, format!("there are {} {label}: at most {max} are possible", array.len()));
        }
        let open = |element: &'a toml::Spanned<DeValue<'a>>| {
            if let DeValue::Table(table) = element.get_ref() {
                Some(Section::new(label, table, element.span().start, known, self.collector))
            } else {
                self.report(key, element.span().start, &format!("must be written as {label}"));
                None
            }
        };
        array.iter().take(max).filter_map(open).collect()
    }

    fn parse<T>(
        &self,
        key: &str,
        value: &toml::Spanned<DeValue<'a>>,
        parse: impl Fn(&DeValue<'a>) -> Parsed<T>,
    ) -> Option<At<T>> {
        let at = value.span().start;
        match parse(value.get_ref()) {
            Ok(value) => Some(At { value, at }),
            Err(phrase) => {
                self.report(key, at, &phrase);
                None
            }
        }
    }
}

/// The known key that `name` is probably a misspelling of.
pub(super) fn nearest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    let distances = known.iter().map(|key| (strsim::damerau_levenshtein(name, key), *key));
    // At most two typing errors, and fewer in a short word. Beyond that the nearest key is not more likely than any
    // other.
    distances.min().filter(|(distance, key)| *distance <= 2 && distance * 2 < key.len()).map(|(_, key)| key)
}

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

pub(super) fn string(value: &DeValue<'_>) -> Parsed<String> {
    value.as_str().map(str::to_owned).ok_or_else(|| format!("must be a string, not {}", kind(value)))
}

pub(super) fn number<T>(range: RangeInclusive<T>) -> impl Fn(&DeValue<'_>) -> Parsed<T>
where
    T: TryFrom<u64> + PartialOrd + Display,
{
    move |value| {
        let Some(integer) = value.as_integer() else {
            return Err(format!("must be a whole number, not {}", kind(value)));
        };
        let parsed = u64::from_str_radix(integer.as_str(), integer.radix()).ok().and_then(|n| T::try_from(n).ok());
        parsed
            .filter(|n| range.contains(n))
            .ok_or_else(|| format!("is {integer}, out of range: give {} to {}", range.start(), range.end()))
    }
}

/// A string that `T` parses. `what` describes the expected value, with an example.
pub(super) fn text<T: FromStr>(what: &str) -> impl Fn(&DeValue<'_>) -> Parsed<T> {
    move |value| {
        let text = string(value)?;
        text.parse().map_err(|_| format!("is {text:?}: give {what}"))
    }
}

/// One of the words of `all`.
pub(super) fn word<T: Copy>(all: &[T], name: fn(T) -> &'static str) -> impl Fn(&DeValue<'_>) -> Parsed<T> {
    move |value| {
        let text = string(value)?;
        all.iter().copied().find(|known| name(*known) == text).ok_or_else(|| {
            let words: Vec<String> = all.iter().map(|known| format!("{:?}", name(*known))).collect();
            format!("is {text:?}: give one of {}", words.join(", "))
        })
    }
}
