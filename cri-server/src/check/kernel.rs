//! What of pods' confinement the node's kernel has.

use podsandbox::Machine;
use podsandbox::config::RuntimeConfig;
use podsandbox::confinement::{self, Confinement, Facilities, Lack};

use super::Verdict::{self, Bad, Fair, Good, Note};
use crate::config::Config;

/// `default_is`: what pods of the default handler run on, unless it is the node's
/// kernel, where they have nothing of this.
pub(super) fn rows(
    node: &Facilities,
    config: &Config,
    default_is: Option<Machine>,
) -> Vec<(String, Verdict)> {
    let wanted = config.confinement;
    let default = config.runtimes.get(&config.default_runtime);
    let uml_is_sealed = matches!(default_is, Some(Machine::Uml(_)))
        && default.is_some_and(|handler| !handler.uml_unsealed);
    let rows = [
        ("seccomp filters", filters(node, wanted, uml_is_sealed)),
        ("Landlock", landlock(node, wanted)),
        ("control groups", limits(wanted)),
    ];
    let of_default =
        |(name, verdict): (&str, Verdict)| (name.to_owned(), unless(default_is.is_none(), verdict));
    let mut rows: Vec<_> = rows.into_iter().map(of_default).collect();
    let wants_cores = |handler: &RuntimeConfig| handler.core_scheduling;
    if config.runtimes.values().any(wants_cores) {
        let is_others = !default.is_some_and(wants_cores);
        let verdict = unless(is_others, cores(node, wanted));
        rows.push(("core scheduling".to_owned(), verdict));
    }
    rows
}

/// Nothing is bad for pods of the default handler that only those of others need.
fn unless(is_others: bool, verdict: Verdict) -> Verdict {
    match verdict {
        Bad { found, remedy } if is_others => Note { found, remedy },
        verdict => verdict,
    }
}

/// `uml_is_sealed`: pods of the default handler run on `uml`, and do not start
/// without filters.
fn filters(node: &Facilities, wanted: Confinement, uml_is_sealed: bool) -> Verdict {
    match node.filters() {
        Ok(found) if node.tells_refusals() => Good(found),
        Ok(found) => Fair {
            found: format!("{found}; what a uml guest's kernel is refused is not told"),
            remedy: "a kernel of Linux 5.0 or later".to_owned(),
        },
        Err(lack) => match lacking(lack, wanted) {
            Note { found, remedy } if uml_is_sealed => Bad { found, remedy },
            verdict => verdict,
        },
    }
}

/// What the daemon can know before there is a pod: a group may lack what its
/// node has.
fn limits(wanted: Confinement) -> Verdict {
    match confinement::limits() {
        Ok(found) => Good(found),
        Err(lack) => lacking(lack, wanted),
    }
}

fn cores(node: &Facilities, wanted: Confinement) -> Verdict {
    match node.core_scheduling() {
        Ok(found) => Good(found),
        Err(lack) => lacking(lack, wanted),
    }
}

fn landlock(node: &Facilities, wanted: Confinement) -> Verdict {
    match node.landlock() {
        Ok(found) => Good(found),
        Err(lack) => lacking(lack, wanted),
    }
}

fn lacking(lack: Lack, wanted: Confinement) -> Verdict {
    let found = format!("{lack}: {}", lack.meaning);
    match wanted {
        Confinement::BestEffort => Note {
            found,
            remedy: lack.remedy,
        },
        Confinement::Required => Bad {
            found: format!("{found}. No pod with a kernel of its own starts"),
            remedy: format!("{}; or `confinement: best_effort`", lack.remedy),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lacking_makes_a_node_bad_only_where_it_is_required() {
        let none = Facilities::none();
        for verdict in [
            filters(&none, Confinement::BestEffort, false),
            landlock(&none, Confinement::BestEffort),
        ] {
            assert!(matches!(verdict, Note { .. }));
        }
        for verdict in [
            filters(&none, Confinement::Required, false),
            landlock(&none, Confinement::Required),
        ] {
            let Bad { found, remedy } = verdict else {
                panic!("not bad");
            };
            assert!(found.contains("the node's kernel has no"), "{found}");
            assert!(remedy.contains("`confinement: best_effort`"), "{remedy}");
        }
        // Whatever is required: they do not start.
        let of_default = filters(&none, Confinement::BestEffort, true);
        assert!(matches!(of_default, Bad { .. }));
    }

    #[test]
    fn cores_are_told_of_where_a_handler_wants_them() {
        let names = |core_scheduling| {
            let mut config = Config::default();
            let handler = config.runtimes.get_mut("microvm").unwrap();
            handler.core_scheduling = core_scheduling;
            let rows = rows(&Facilities::none(), &config, Some(Machine::Kvm));
            rows.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert!(!names(false).contains(&"core scheduling".to_owned()));
        assert!(names(true).contains(&"core scheduling".to_owned()));
    }

    #[test]
    fn a_node_whose_pods_have_its_kernel_is_not_bad() {
        let config = Config {
            confinement: Confinement::Required,
            ..Config::default()
        };
        let rows = rows(&Facilities::none(), &config, None);
        for (name, verdict) in rows {
            assert!(matches!(verdict, Note { .. } | Good(_)), "{name}");
        }
    }

    #[test]
    fn a_kernel_that_has_all_is_good() {
        let whole = Facilities::whole();
        for wanted in [Confinement::BestEffort, Confinement::Required] {
            assert!(matches!(filters(&whole, wanted, true), Good(_)));
            assert!(matches!(landlock(&whole, wanted), Good(_)));
        }
    }
}
