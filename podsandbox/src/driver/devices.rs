//! The devices of a container that is being created: what its CDI devices make
//! of it, what is behind its device files, and the disks among them.

use std::os::fd::AsFd;

use vmm_client::Control;

use super::Driver;
use super::create::mounting;
use crate::Result;
use crate::cdi::{self, CdiError, Extras, Name};
use crate::devices::guest::{self, Wanted};
use crate::devices::on_host::{self, Owner};
use crate::devices::{Ask, DeviceError, DeviceSlot, Node, node};
use crate::record::ContainerRecord;
use crate::spec::ContainerSpec;

/// What a container gets besides what its spec says.
#[derive(Debug, Default)]
pub(super) struct Devices {
    nodes: Vec<Node>,
    extras: Extras,
}

impl Devices {
    /// The block devices that are to be disks of a pod with its own kernel.
    pub(super) fn disks(&self) -> Vec<Wanted<'_>> {
        guest::disks(&self.nodes)
    }

    /// Puts into `spec` what both kinds of pods have of it.
    pub(super) fn add_extras(&self, spec: &mut oci_spec::runtime::Spec) -> Result<()> {
        Ok(cdi::add(spec, &self.extras)?)
    }

    pub(super) fn add_on_host(
        &self,
        spec: &mut oci_spec::runtime::Spec,
        user: &agent_api::User,
    ) -> Result<()> {
        on_host::add(spec, &self.nodes, Owner::new(user))?;
        self.add_extras(spec)
    }
}

impl Driver {
    /// Makes of `spec` what it comes to with its CDI devices, and finds its
    /// devices on the node.
    pub(super) async fn resolve_devices(
        &self,
        mut spec: ContainerSpec,
    ) -> Result<(ContainerSpec, Devices)> {
        if spec.devices.is_empty() && spec.cdi_devices.is_empty() {
            return Ok((spec, Devices::default()));
        }
        let on_host = self.is_on_host();
        let dirs = self.context.config.cdi_spec_dirs.clone();
        let asked = spec.clone();
        // A path may be on a file system that hangs.
        mounting(&asked, move || {
            let mut asks: Vec<Ask> = spec.devices.iter().map(ask).collect();
            let names = spec.cdi_devices.iter().map(|name| name.parse());
            let names: Vec<Name> = names
                .collect::<std::result::Result<_, _>>()
                .map_err(CdiError::Name)?;
            let (of_cdi, extras) = cdi::resolve(&dirs, &names)?.change(&mut spec, on_host)?;
            asks.extend(of_cdi);
            let nodes = if on_host {
                node::find(&asks, |_| false)?
            } else {
                let nodes = node::find(&asks, guest::has)?;
                guest::check(&nodes)?;
                nodes
            };
            Ok((spec, Devices { nodes, extras }))
        })
        .await
    }

    /// The slot that a container of the pod has `wanted` on: two containers
    /// with one device share its disk, as its cache in the guest is one.
    pub(super) fn slot_of_device(&self, wanted: &Wanted<'_>) -> Result<Option<DeviceSlot>> {
        let number = (wanted.node.major, wanted.node.minor);
        let is_it = |slot: &DeviceSlot| (slot.major, slot.minor) == number;
        let held = self.containers.values().find_map(|container| {
            let slot = container.device_slots.iter().find(|slot| is_it(slot))?;
            Some((container, slot))
        });
        match held {
            Some((holder, slot)) if slot.read_only && !wanted.read_only => {
                let error = DeviceError::ReadOnlyInPod {
                    field: wanted.node.field.clone(),
                    path: wanted.node.host_path.clone(),
                    holder: holder.id.clone(),
                };
                Err(error.into())
            }
            held => Ok(held.map(|(_, slot)| *slot)),
        }
    }

    /// Whether another container has the disk of `slot` too.
    pub(super) fn is_shared(&self, slot: u32, id: &str) -> bool {
        let others = self.containers.values().filter(|other| other.id != id);
        others
            .flat_map(|other| &other.device_slots)
            .any(|other| other.slot == slot)
    }

    /// Hands the block devices of a container to the VMM, but for those that
    /// it has; how the agent is to make the container's device files.
    pub(super) async fn attach_devices(
        &mut self,
        record: &ContainerRecord,
        devices: &Devices,
        user: &agent_api::User,
    ) -> Result<Vec<agent_api::Device>> {
        let mut sizes = Vec::with_capacity(record.device_slots.len());
        // Slots were chosen for these disks, in their order.
        for (wanted, slot) in devices.disks().into_iter().zip(&record.device_slots) {
            let (node, slot) = (wanted.node.clone(), *slot);
            let opened = mounting(&record.spec, move || Ok(guest::open(&node, &slot)?));
            let (file, bytes) = opened.await?;
            sizes.push(bytes);
            if !self.is_shared(slot.slot, &record.id) {
                let control: &mut Control = &mut self.machine_mut()?.control;
                control
                    .attach_device(slot.slot, file.as_fd(), slot.read_only)
                    .await?;
            }
        }
        Ok(guest::requests(
            &devices.nodes,
            &record.device_slots,
            &sizes,
            Owner::new(user),
        ))
    }
}

fn ask(device: &crate::devices::Device) -> Ask {
    Ask {
        field: format!("config.devices[{}]", device.container_path.display()),
        host_path: device.host_path.clone(),
        container_path: device.container_path.clone(),
        access: device.access,
        stated: None,
    }
}
