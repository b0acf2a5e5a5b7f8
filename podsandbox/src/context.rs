//! What every pod driver shares.

use std::sync::Arc;

use crate::config::Config;
use crate::events::Events;
use crate::network::Network;
use crate::observer::Observer;
use crate::store::Store;
use imagesvc::ImageService;

pub struct Context {
    pub config: Config,
    pub store: Store,
    pub images: ImageService,
    pub network: Network,
    pub events: Events,
    pub observer: Arc<dyn Observer>,
}

/// Nanoseconds since the epoch, the unit of CRI's times.
#[must_use]
pub fn now_nanos() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}
