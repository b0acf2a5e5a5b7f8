//! Medians with their spread, and what they are held to.

use std::fmt;

/// Samples of one thing.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_by(f64::total_cmp);
    }

    pub fn median(&self) -> f64 {
        self.0.get(self.0.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.0.first(), self.0.last());
        let end = |value: Option<&f64>| value.copied().unwrap_or(f64::NAN);
        let spread = format!("({:.1}..{:.1})", end(first), end(last));
        write!(f, "{:>9.1} {spread:<20}", self.median())
    }
}

/// What a figure shall be.
#[derive(Clone, Copy, Debug)]
pub enum Aim {
    AtMost(f64),
    AtLeast(f64),
}

impl Aim {
    fn verdict(self, value: f64) -> String {
        let (met, text) = match self {
            Self::AtMost(aim) => (value <= aim, format!("aim <= {aim}")),
            Self::AtLeast(aim) => (value >= aim, format!("aim >= {aim}")),
        };
        format!("{text}: {}", if met { "met" } else { "MISSED" })
    }
}

pub fn heading(title: &str) {
    println!("\n{title:<30}{:<31}{:<31}", "drupe", "QEMU microvm");
}

/// A line with both sides and their ratio, held to `aim` if there is one.
pub fn ratio(label: &str, ours: &Samples, theirs: &Samples, aim: Option<Aim>) {
    let ratio = ours.median() / theirs.median();
    let verdict = aim.map(|aim| aim.verdict(ratio)).unwrap_or_default();
    println!("{label:<28}{ours} {theirs} ratio {ratio:.2}  {verdict}");
}

/// A line whose figure is held to `aim` by itself.
pub fn figure(label: &str, ours: &Samples, theirs: &Samples, aim: Option<Aim>) {
    let verdict = aim
        .map(|aim| aim.verdict(ours.median()))
        .unwrap_or_default();
    println!("{label:<28}{ours} {theirs}             {verdict}");
}
