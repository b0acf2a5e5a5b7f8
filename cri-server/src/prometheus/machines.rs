//! Gauges of machines: which one each handler's pods get and have.

use std::collections::BTreeMap;
use std::fmt;

use podsandbox::PodManager;
use podsandbox::config::{Engine, Runtime};
use podsandbox::host::find_program;
use podsandbox::record::{HOST, machine_name};
use prometheus_client::encoding::DescriptorEncoder;

use super::pods::gauges;

/// By handler and machine.
type ByMachine = BTreeMap<(String, &'static str), u64>;

#[derive(Default)]
pub(super) struct Machines {
    /// Whether pods can start: 1 or 0.
    usable: ByMachine,
    /// Pods that serve.
    pods: ByMachine,
}

impl Machines {
    /// The handlers of the configuration, none of them with a pod.
    pub(super) fn of(pods: &PodManager) -> Self {
        let mut machines = Self::default();
        for (handler, runtime) in &pods.config().runtimes {
            let (machine, usable) = usable(runtime);
            machines.handler(handler, machine, usable);
        }
        machines
    }

    pub(super) fn handler(&mut self, handler: &str, machine: &'static str, usable: bool) {
        let key = (handler.to_owned(), machine);
        self.usable.insert(key.clone(), u64::from(usable));
        self.pods.entry(key).or_default();
    }

    /// One that serves. A handler may have pods of another machine, from
    /// before its own was another.
    pub(super) fn pod(&mut self, handler: &str, machine: &'static str) {
        *self.pods.entry((handler.to_owned(), machine)).or_default() += 1;
    }

    pub(super) fn encode(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        fn by(values: &ByMachine) -> impl Iterator<Item = ([(&str, &str); 2], u64)> {
            values.iter().map(|((handler, machine), value)| {
                (
                    [("handler", handler.as_str()), ("machine", *machine)],
                    *value,
                )
            })
        }
        let help = "Whether pods of a handler can start, on the machine that it has.";
        gauges(encoder, "handler_usable", help, by(&self.usable))?;
        let help = "Pods that serve, by what their kernel runs on.";
        gauges(encoder, "machine_pods", help, by(&self.pods))
    }
}

/// As it was when the daemon started; what was amiss may have been mended.
fn usable(runtime: &Runtime) -> (&'static str, bool) {
    match &runtime.engine {
        Engine::Machine(decision) if decision.withheld => {
            let withheld = runtime.settings.still_withheld(decision).is_some();
            (machine_name(decision.machine), !withheld)
        }
        Engine::Machine(decision) => (machine_name(decision.machine), decision.usable),
        Engine::Oci(program) => (HOST, find_program(program).is_some()),
    }
}
