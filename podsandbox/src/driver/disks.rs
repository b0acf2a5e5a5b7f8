//! The disks that a container's images are: its own and those of its image
//! volumes, each leased from the image store and attached to a slot. The node's
//! block devices take slots of the same ones.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};

use imagesvc::{ImageService, LayerFile, Lease};
use vmm_client::Control;

use super::Driver;
use super::devices::Devices;
use crate::devices::DeviceSlot;
use crate::devices::guest::Wanted;
use crate::record::ContainerRecord;
use crate::spec::{ContainerSpec, image_volumes};
use crate::{Error, Result};

/// Without a machine there are no disks: a slot is only a number, and this the
/// images that a pod can have mounted.
const MAX_IMAGES_ON_HOST: u32 = 128;
/// Layers begin on this boundary of their disk.
const LAYER_ALIGN: u64 = 4096;

/// Free slots, for a container's own image and for its image volumes; those for
/// block devices may be other containers' with the same ones.
pub(super) struct Slots {
    root: u32,
    volumes: Vec<u32>,
    pub(super) devices: Vec<DeviceSlot>,
}

/// A container's own image, and its image volumes.
pub(super) struct Disks {
    pub(super) root: Disk,
    pub(super) volumes: Vec<Disk>,
}

/// An image that stays on the node, and the slot its disk goes to.
pub(super) struct Disk {
    pub(super) slot: u32,
    pub(super) lease: Lease,
}

impl Disk {
    /// Hands the image's layers to the VMM; how the agent finds them.
    pub(super) async fn attach(
        &self,
        images: &ImageService,
        control: &mut Control,
    ) -> Result<agent_api::RootDisk> {
        let files = images.open_layers(&self.lease.layers).await?;
        let layers = places(&self.lease.layers);
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        control.attach_disk(self.slot, &files).await?;
        Ok(agent_api::RootDisk {
            slot: self.slot,
            layers,
        })
    }
}

/// Who holds the lease of an image volume. The container itself holds that of
/// its own image.
fn volume_owner(container: &str, number: usize) -> String {
    format!("{container}.{number}")
}

/// The container that a lease's owner stands for.
pub(crate) fn lease_holder(owner: &str) -> &str {
    owner.split_once('.').map_or(owner, |(id, _)| id)
}

impl Driver {
    /// Slots for the image of `spec`, its image volumes and its block devices.
    /// Those of containers that have ended are about to be free.
    pub(super) async fn await_slots(
        &mut self,
        spec: &ContainerSpec,
        devices: &Devices,
    ) -> Result<Slots> {
        let volumes = image_volumes(&spec.mounts).count();
        loop {
            let slots = self.free_slots(volumes, devices);
            if slots.is_ok() {
                return slots;
            }
            match self.freeing.join_next().await {
                Some(freed) => self.learn_freed(freed).await,
                None => return slots,
            }
        }
    }

    fn free_slots(&self, volumes: usize, devices: &Devices) -> Result<Slots> {
        let disks = if self.is_on_host() {
            Vec::new()
        } else {
            devices.disks()
        };
        let held = disks.iter().map(|disk| self.slot_of_device(disk));
        let held: Vec<Option<DeviceSlot>> = held.collect::<Result<_>>()?;
        let new_devices = held.iter().filter(|slot| slot.is_none()).count();
        let needed = 1 + volumes + new_devices;
        let slots = if self.is_on_host() {
            MAX_IMAGES_ON_HOST
        } else {
            let (_, runtime) = self.context.config.runtime(&self.record.handler)?;
            runtime.settings.disk_slots
        };
        let taken: BTreeSet<u32> = self.containers.values().flat_map(slots_of).collect();
        let free = (0..slots).filter(|slot| !taken.contains(slot));
        let free: Vec<u32> = free.take(needed).collect();
        match free.split_first() {
            Some((&root, rest)) if free.len() == needed => {
                let (volumes, rest) = rest.split_at(volumes);
                let mut rest = rest.iter().copied();
                let device = |(disk, held): (&Wanted<'_>, &Option<DeviceSlot>)| {
                    held.or_else(|| {
                        Some(DeviceSlot {
                            slot: rest.next()?,
                            major: disk.node.major,
                            minor: disk.node.minor,
                            read_only: disk.read_only,
                        })
                    })
                };
                Ok(Slots {
                    root,
                    volumes: volumes.to_vec(),
                    devices: disks.iter().zip(&held).filter_map(device).collect(),
                })
            }
            _ if self.is_on_host() => Err(Error::TooManyImages {
                id: self.record.id.clone(),
                max: slots,
                taken: taken.len(),
                needed,
            }),
            _ => Err(Error::NoDiskSlot {
                id: self.record.id.clone(),
                slots,
                taken: taken.len(),
                needed,
            }),
        }
    }

    /// Leases the image of `spec` and its image volumes for container `id`.
    /// Leaves none when it fails.
    pub(super) async fn lease_disks(
        &self,
        spec: &ContainerSpec,
        id: &str,
        slots: &Slots,
    ) -> Result<Disks> {
        match self.try_lease(spec, id, slots).await {
            Ok(disks) => Ok(disks),
            Err(error) => {
                if let Err(left) = self.release_disks(spec, id).await {
                    tracing::warn!(container = id, error = %left.sentence(), "a lease is left until the daemon's next start");
                }
                Err(error)
            }
        }
    }

    async fn try_lease(&self, spec: &ContainerSpec, id: &str, slots: &Slots) -> Result<Disks> {
        let images = &self.context.images;
        let root = Disk {
            slot: slots.root,
            lease: images.lease(&spec.image, id).await?,
        };
        let mut volumes = Vec::with_capacity(slots.volumes.len());
        let asked = image_volumes(&spec.mounts).enumerate();
        for ((number, (mount, volume)), &slot) in asked.zip(&slots.volumes) {
            let leased = images.lease(&volume.image, &volume_owner(id, number)).await;
            let lease = leased.map_err(|source| Error::ImageVolume {
                container_path: mount.container_path.display().to_string(),
                source: Box::new(source),
            })?;
            volumes.push(Disk { slot, lease });
        }
        Ok(Disks { root, volumes })
    }

    /// Fine with any of them being gone.
    pub(super) async fn release_disks(&self, spec: &ContainerSpec, id: &str) -> Result<()> {
        for (number, _) in image_volumes(&spec.mounts).enumerate() {
            let owner = volume_owner(id, number);
            self.context.images.release(&owner).await?;
        }
        Ok(self.context.images.release(id).await?)
    }
}

pub(super) fn slots_of(container: &ContainerRecord) -> impl Iterator<Item = u32> {
    let volumes = container.volume_slots.iter().copied();
    let devices = container.device_slots.iter().map(|device| device.slot);
    container.slot.into_iter().chain(volumes).chain(devices)
}

/// Where each layer lies on the disk that they form.
fn places(layers: &[LayerFile]) -> Vec<agent_api::Layer> {
    let mut next = 0;
    let place = |layer: &LayerFile| {
        let (offset, length) = (next, layer.len.next_multiple_of(LAYER_ALIGN));
        next += length;
        agent_api::Layer { offset, length }
    };
    layers.iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_its_containers() {
        assert_eq!(lease_holder("0a1b"), "0a1b");
        assert_eq!(lease_holder(&volume_owner("0a1b", 3)), "0a1b");
    }
}
