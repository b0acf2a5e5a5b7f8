//! Version, Status and the runtime's configuration.

use std::collections::BTreeMap;
use std::net::IpAddr;

use cri_api::v1;
use podsandbox::config::{Config, Engine};
use podsandbox::host::features::mounts_read_only_recursively;
use podsandbox::host::find_program;
use tonic::Status;

use super::Runtime;
use crate::convert::invalid;

const RUNTIME_NAME: &str = "drupe";
/// Of the CRI that is spoken.
const CRI_VERSION: &str = "v1";
/// Of the kubelet's runtime API, as the field's runtimes answer it.
const KUBELET_API_VERSION: &str = "0.1.0";

pub fn version() -> v1::VersionResponse {
    v1::VersionResponse {
        version: KUBELET_API_VERSION.to_owned(),
        runtime_name: RUNTIME_NAME.to_owned(),
        runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_api_version: CRI_VERSION.to_owned(),
    }
}

/// The kubelet makes the pods' control groups itself, by cgroupfs paths.
pub fn runtime_config() -> v1::RuntimeConfigResponse {
    v1::RuntimeConfigResponse {
        linux: Some(v1::LinuxRuntimeConfiguration {
            cgroup_driver: v1::CgroupDriver::Cgroupfs.into(),
        }),
    }
}

/// The node's pod CIDR. drupe takes its network from CNI configuration, which
/// the network plugin writes; the CIDR is checked and otherwise not needed.
pub fn update_runtime_config(request: &v1::UpdateRuntimeConfigRequest) -> Result<(), Status> {
    let config = request.runtime_config.as_ref();
    let cidrs = config
        .and_then(|c| c.network_config.as_ref())
        .map(|n| n.pod_cidr.as_str());
    for cidr in cidrs
        .unwrap_or_default()
        .split(',')
        .filter(|cidr| !cidr.is_empty())
    {
        let valid = cidr.split_once('/').is_some_and(|(ip, length)| {
            let max = match ip.parse::<IpAddr>() {
                Ok(IpAddr::V4(_)) => 32,
                Ok(IpAddr::V6(_)) => 128,
                Err(_) => return false,
            };
            length.parse::<u8>().is_ok_and(|length| length <= max)
        });
        if !valid {
            return Err(invalid(
                "runtime_config.network_config.pod_cidr",
                format_args!("{cidr:?} is no CIDR"),
            ));
        }
    }
    Ok(())
}

impl Runtime {
    /// Asked each time: a runtime may be installed or replaced any time.
    pub(super) async fn features(&self) -> Features {
        features(self.pods.config()).await
    }

    pub(super) fn show_status(&self, verbose: bool, features: &Features) -> v1::StatusResponse {
        let network = self.pods.network_state();
        let condition =
            |kind: &str, state: &Result<(), String>, reason: &str| v1::RuntimeCondition {
                r#type: kind.to_owned(),
                status: state.is_ok(),
                reason: if state.is_ok() {
                    String::new()
                } else {
                    reason.to_owned()
                },
                message: state.as_ref().err().cloned().unwrap_or_default(),
            };
        let config = self.pods.config();
        let handler = |name: &str, of: &str| v1::RuntimeHandler {
            name: name.to_owned(),
            features: features.get(of).copied(),
        };
        let names = config.runtimes.keys();
        let mut runtime_handlers: Vec<v1::RuntimeHandler> =
            names.map(|name| handler(name, name)).collect();
        runtime_handlers.push(handler("", &config.default_runtime));
        let details = || {
            crate::json_info(serde_json::json!({
                "root": config.root,
                "runDir": config.run_dir,
                "cdiSpecDirs": config.cdi_spec_dirs,
                "defaultRuntime": config.default_runtime,
                "runtimes": config.runtimes,
                "pods": self.pods.list().len(),
            }))
        };
        v1::StatusResponse {
            status: Some(v1::RuntimeStatus {
                conditions: vec![
                    condition("RuntimeReady", &Ok(()), ""),
                    condition("NetworkReady", &network, "NetworkPluginNotReady"),
                ],
            }),
            info: if verbose {
                details()
            } else {
                Default::default()
            },
            runtime_handlers,
            features: Some(v1::RuntimeFeatures {
                supplemental_groups_policy: true,
                // A pod in the host's network has the host's users.
                user_namespaces_host_network: false,
            }),
        }
    }
}

/// By handler.
pub(super) type Features = BTreeMap<String, v1::RuntimeHandlerFeatures>;

/// What pods of each handler can have. OCI runtimes are asked.
async fn features(config: &Config) -> Features {
    let mut all = Features::new();
    for (name, runtime) in &config.runtimes {
        let features = match &runtime.engine {
            Engine::Machine(_) => v1::RuntimeHandlerFeatures {
                recursive_read_only_mounts: true,
                user_namespaces: true,
            },
            Engine::Oci(program) => v1::RuntimeHandlerFeatures {
                recursive_read_only_mounts: match find_program(program) {
                    Some(found) => mounts_read_only_recursively(&found).await,
                    None => false,
                },
                user_namespaces: false,
            },
        };
        all.insert(name.clone(), features);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_cidr_is_checked() {
        let with = |cidr: &str| v1::UpdateRuntimeConfigRequest {
            runtime_config: Some(v1::RuntimeConfig {
                network_config: Some(v1::NetworkConfig {
                    pod_cidr: cidr.to_owned(),
                }),
            }),
        };
        assert!(update_runtime_config(&with("10.1.0.0/24,fd00::/64")).is_ok());
        assert!(update_runtime_config(&with("")).is_ok());
        for bad in ["10.1.0.0", "10.1.0.0/33", "x/8"] {
            assert!(
                update_runtime_config(&with(bad))
                    .unwrap_err()
                    .message()
                    .contains(bad)
            );
        }
    }
}
