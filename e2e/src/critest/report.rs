//! What ginkgo's JSON report says of each spec.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Lines of a failure's message that are shown.
const SHOWN_LINES: usize = 12;

/// What critest never runs but when asked to measure.
const BENCHMARKS: &str = "benchmark";

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    /// With the reason that the spec itself gave.
    Skipped(String),
    /// Left out by the command line.
    NotSelected,
    /// With what was expected and where.
    Failed(String),
}

#[derive(Clone, Debug)]
pub struct Spec {
    pub name: String,
    pub outcome: Outcome,
    pub seconds: f64,
}

#[derive(Clone, Debug)]
pub struct Report {
    /// Without the benchmarks.
    pub specs: Vec<Spec>,
    pub seconds: f64,
}

impl Report {
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| path.display().to_string())?;
        let suites: Value =
            serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?;
        Self::parse(&suites).with_context(|| path.display().to_string())
    }

    fn parse(suites: &Value) -> Result<Self> {
        let suites = suites.as_array().context("no list of suites")?;
        let mut specs = Vec::new();
        let mut seconds = 0.0;
        for suite in suites {
            seconds += to_seconds(&suite["RunTime"]);
            let all = suite["SpecReports"].as_array();
            for spec in all.context("a suite without specs")? {
                specs.extend(parse_spec(spec)?);
            }
        }
        ensure!(!specs.is_empty(), "no spec is reported");
        Ok(Self { specs, seconds })
    }

    pub fn failed(&self) -> impl Iterator<Item = (&Spec, &str)> {
        self.specs.iter().filter_map(|spec| match &spec.outcome {
            Outcome::Failed(why) => Some((spec, why.as_str())),
            _ => None,
        })
    }

    /// Names of the specs that skipped themselves, by their reason.
    #[must_use]
    pub fn skipped(&self) -> BTreeMap<&str, Vec<&str>> {
        let mut reasons = BTreeMap::<_, Vec<_>>::new();
        for spec in &self.specs {
            if let Outcome::Skipped(reason) = &spec.outcome {
                reasons
                    .entry(reason.as_str())
                    .or_default()
                    .push(spec.name.as_str());
            }
        }
        reasons
    }

    /// Specs that did not run, for a reason that none of `lacking` is in or,
    /// chosen by the command line, without a name that one of `left_out` is in.
    #[must_use]
    pub fn unexpected(&self, lacking: &[&str], left_out: &[&str]) -> Vec<&str> {
        let has = |text: &str, any: &[&str]| any.iter().any(|word| text.contains(word));
        let not_run = self.specs.iter().filter(|spec| match &spec.outcome {
            Outcome::Skipped(reason) => !has(reason, lacking),
            Outcome::NotSelected => !has(&spec.name, left_out),
            Outcome::Passed | Outcome::Failed(_) => false,
        });
        not_run.map(|spec| spec.name.as_str()).collect()
    }

    fn count(&self, of: impl Fn(&Outcome) -> bool) -> usize {
        self.specs.iter().filter(|spec| of(&spec.outcome)).count()
    }
}

/// One line of numbers.
impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped themselves, {} left out, of {} specs, in {:.0} s",
            self.count(|outcome| *outcome == Outcome::Passed),
            self.count(|outcome| matches!(outcome, Outcome::Failed(_))),
            self.count(|outcome| matches!(outcome, Outcome::Skipped(_))),
            self.count(|outcome| *outcome == Outcome::NotSelected),
            self.specs.len(),
            self.seconds
        )
    }
}

/// None: a benchmark, or a hook of the suite that did not fail.
fn parse_spec(spec: &Value) -> Result<Option<Spec>> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut parts: Vec<_> = spec["ContainerHierarchyTexts"]
        .as_array()
        .into_iter()
        .flatten()
        .map(text)
        .collect();
    let kind = text(&spec["LeafNodeType"]);
    let is_hook = kind != "It";
    parts.push(if is_hook {
        kind
    } else {
        text(&spec["LeafNodeText"])
    });
    let name = parts.join(" ");
    let state = spec["State"].as_str().context("a spec without state")?;
    let message = text(&spec["Failure"]["Message"]);
    let outcome = match state {
        "passed" => Outcome::Passed,
        "skipped" | "pending" if message.is_empty() => Outcome::NotSelected,
        "skipped" => Outcome::Skipped(message),
        _ => Outcome::Failed(describe(state, &message, &spec["Failure"])),
    };
    let is_failure = matches!(outcome, Outcome::Failed(_));
    if (is_hook && !is_failure) || (outcome == Outcome::NotSelected && name.contains(BENCHMARKS)) {
        return Ok(None);
    }
    Ok(Some(Spec {
        name,
        outcome,
        seconds: to_seconds(&spec["RunTime"]),
    }))
}

fn describe(state: &str, message: &str, failure: &Value) -> String {
    let panic = failure["ForwardedPanic"].as_str().unwrap_or_default();
    let file = failure["Location"]["FileName"].as_str().unwrap_or_default();
    let mut lines: Vec<_> = message
        .lines()
        .chain(panic.lines())
        // Below is the dump of a Go value.
        .take_while(|line| line.trim() != "{")
        .filter(|line| !line.trim().is_empty())
        .take(SHOWN_LINES)
        .map(str::to_owned)
        .collect();
    lines.push(format!(
        "{state} at {}:{}",
        file.rsplit('/').next().unwrap_or_default(),
        failure["Location"]["LineNumber"]
    ));
    lines.join("\n")
}

/// Of nanoseconds.
fn to_seconds(value: &Value) -> f64 {
    value.as_f64().unwrap_or_default() / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(name: &str, state: &str, message: &str) -> Value {
        json!({
            "ContainerHierarchyTexts": ["[k8s.io] Pods"],
            "LeafNodeType": "It",
            "LeafNodeText": name,
            "State": state,
            "RunTime": 1_500_000_000_u64,
            "Failure": { "Message": message, "Location": { "FileName": "a/b.go", "LineNumber": 7 } },
        })
    }

    #[test]
    fn specs_are_counted_by_how_they_ended() {
        let suites = json!([{
            "RunTime": 90_000_000_000_u64,
            "SpecReports": [
                { "LeafNodeType": "BeforeSuite", "State": "passed" },
                spec("a", "passed", ""),
                spec("b", "failed", "Expected 1"),
                spec("c", "timedout", ""),
                spec("d", "skipped", "no AppArmor"),
                spec("e", "skipped", ""),
                spec("benchmark about pods", "skipped", ""),
            ],
        }]);
        let report = Report::parse(&suites).unwrap();
        assert_eq!(
            report.to_string(),
            "1 passed, 2 failed, 1 skipped themselves, 1 left out, of 5 specs, in 90 s"
        );
        let (failed, why) = report.failed().next().unwrap();
        assert_eq!(failed.name, "[k8s.io] Pods b");
        assert_eq!(why, "Expected 1\nfailed at b.go:7");
        assert_eq!(report.skipped()["no AppArmor"], ["[k8s.io] Pods d"]);
        assert!(report.unexpected(&["AppArmor"], &["Pods e"]).is_empty());
        assert_eq!(
            report.unexpected(&["SELinux"], &["Pods e"]),
            ["[k8s.io] Pods d"]
        );
        assert_eq!(report.unexpected(&["AppArmor"], &[]), ["[k8s.io] Pods e"]);
    }

    #[test]
    fn a_suite_that_never_began_fails_by_its_hook() {
        let suites = json!([{
            "SpecReports": [{ "LeafNodeType": "BeforeSuite", "State": "panicked" }],
        }]);
        let report = Report::parse(&suites).unwrap();
        assert_eq!(report.failed().count(), 1);
    }

    #[test]
    fn an_empty_report_is_no_success() {
        assert!(Report::parse(&json!([])).is_err());
    }
}
