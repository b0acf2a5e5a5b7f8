//! The size of what a container has written.

use std::path::PathBuf;
use std::time::Duration;

use disk_usage::{Cached, Usage};

/// How long a request for statistics waits for a new measurement; a larger
/// tree is answered with the number before.
const PATIENCE: Duration = Duration::from_millis(100);

/// The directory that takes what the container writes.
#[derive(Debug)]
pub struct Layer {
    path: PathBuf,
    cached: Cached,
}

impl Layer {
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            cached: Cached::default(),
        }
    }

    pub async fn usage(&self) -> Usage {
        let path = self.path.clone();
        let walk = move || disk_usage::measure(&path);
        self.cached.get(PATIENCE, walk).await
    }
}
