//! `drupe runtimeclass`: a RuntimeClass for each handler of the configuration,
//! with what its pods cost, for the nodes on which it works.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cri_server::config::Config;
use k8s_openapi::api::node::v1::{Overhead, RuntimeClass, Scheduling};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};

use super::overhead::{self, Declared};
use super::{CliError, runtime};

/// Who applies, as the API server records it.
const MANAGER: &str = "drupe";
/// A node on which pods of a handler can run is labelled with this and the
/// handler's name.
const HANDLER_LABEL: &str = "handler.drupe.internal";

#[derive(clap::Args)]
pub struct Options {
    /// Install them in the cluster instead of printing them.
    #[arg(long)]
    apply: bool,
    /// How to reach the cluster; without it KUBECONFIG, ~/.kube/config or the
    /// account of the pod in which this runs.
    #[arg(long, requires = "apply")]
    kubeconfig: Option<PathBuf>,
    /// The overhead to declare, in MiB of memory and thousandths of a CPU, for
    /// every handler with machines, instead of measuring it.
    #[arg(long, value_name = "MIB,MILLICPU", value_parser = parse_declared)]
    overhead: Option<Declared>,
    /// Declare no overhead: what pods cost is then hidden from the scheduler.
    #[arg(long, conflicts_with = "overhead")]
    no_overhead: bool,
    #[command(flatten)]
    measure: overhead::Options,
}

fn parse_declared(text: &str) -> Result<Declared, String> {
    let wrong = || "two whole numbers such as 40,5 are wanted".to_owned();
    let (memory, cpu) = text.split_once(',').ok_or_else(wrong)?;
    Ok(Declared {
        memory_mib: memory.parse().map_err(|_| wrong())?,
        cpu_milli: cpu.parse().map_err(|_| wrong())?,
    })
}

pub fn run(config: &Config, options: &Options) -> Result<(), CliError> {
    let classes = classes(config, options)?;
    if options.apply {
        return runtime()?.block_on(apply(&classes, options.kubeconfig.as_deref()));
    }
    let mut out = io::stdout();
    for class in &classes {
        let text = serde_norway::to_string(class)
            .map_err(|error| CliError::Output(io::Error::other(error)))?;
        write!(out, "---\n{text}").map_err(CliError::Output)?;
    }
    Ok(())
}

fn classes(config: &Config, options: &Options) -> Result<Vec<RuntimeClass>, CliError> {
    let wanted = config.runtimes.iter().filter(|(handler, _)| {
        let only = options.measure.handler();
        only.is_none_or(|only| only == handler.as_str())
    });
    let mut classes = Vec::new();
    for (handler, settings) in wanted {
        let declared = match options.overhead {
            _ if settings.oci.is_some() || options.no_overhead => None,
            Some(declared) => Some(declared),
            None => Some(overhead::to_declare(config, handler, &options.measure)?),
        };
        classes.push(class(handler, declared));
    }
    if let (Some(handler), true) = (options.measure.handler(), classes.is_empty()) {
        return Err(CliError::no_handler(handler, config));
    }
    Ok(classes)
}

fn class(handler: &str, declared: Option<Declared>) -> RuntimeClass {
    let label = format!("{HANDLER_LABEL}/{handler}");
    let fixed = declared.map(|declared| {
        BTreeMap::from([
            (
                "memory".to_owned(),
                Quantity(format!("{}Mi", declared.memory_mib)),
            ),
            (
                "cpu".to_owned(),
                Quantity(format!("{}m", declared.cpu_milli)),
            ),
        ])
    });
    RuntimeClass {
        metadata: kube::api::ObjectMeta {
            name: Some(handler.to_owned()),
            ..Default::default()
        },
        handler: handler.to_owned(),
        overhead: fixed.map(|fixed| Overhead {
            pod_fixed: Some(fixed),
        }),
        scheduling: Some(Scheduling {
            node_selector: Some(BTreeMap::from([(label, "true".to_owned())])),
            tolerations: None,
        }),
    }
}

async fn apply(classes: &[RuntimeClass], kubeconfig: Option<&Path>) -> Result<(), CliError> {
    let client = client(kubeconfig).await.map_err(CliError::Kubeconfig)?;
    let api: Api<RuntimeClass> = Api::all(client);
    // What someone else has set of the same fields is overruled: this is asked
    // for by name.
    let params = PatchParams::apply(MANAGER).force();
    for class in classes {
        let name = class.metadata.name.as_deref().unwrap_or_default();
        let applied = api.patch(name, &params, &Patch::Apply(class)).await;
        applied.map_err(|source| CliError::Apply {
            name: name.to_owned(),
            source: source.into(),
        })?;
        writeln!(io::stdout(), "runtimeclass.node.k8s.io/{name} applied")
            .map_err(CliError::Output)?;
    }
    Ok(())
}

async fn client(
    kubeconfig: Option<&Path>,
) -> Result<Client, Box<dyn std::error::Error + Send + Sync>> {
    let config = match kubeconfig {
        Some(path) => {
            let kubeconfig = Kubeconfig::read_from(path)?;
            kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?
        }
        None => kube::Config::infer().await?,
    };
    Ok(Client::try_from(config)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_names_its_handler_the_nodes_and_the_cost() {
        let declared = parse_declared("38,2").unwrap();
        let value = serde_json::to_value(class("microvm", Some(declared))).unwrap();
        assert_eq!(
            value,
            serde_json::json!({
                "apiVersion": "node.k8s.io/v1",
                "kind": "RuntimeClass",
                "metadata": { "name": "microvm" },
                "handler": "microvm",
                "overhead": { "podFixed": { "cpu": "2m", "memory": "38Mi" } },
                "scheduling": { "nodeSelector": { "handler.drupe.internal/microvm": "true" } },
            })
        );
        let host = serde_json::to_value(class("host", None)).unwrap();
        assert_eq!(host.get("overhead"), None);
        for wrong in ["", "38", "38,", "a,1", "38Mi,2"] {
            assert!(parse_declared(wrong).is_err(), "{wrong}");
        }
    }
}
