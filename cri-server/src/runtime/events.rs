//! GetContainerEvents. A subscriber gets what happens from now on; one that
//! falls behind is let go, so that it lists and subscribes again.

use cri_api::v1;
use futures_util::stream;
use podsandbox::events::{Missed, Subscription};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::Runtime;
use crate::chunks::Messages;
use crate::convert::event;

impl Runtime {
    pub(super) fn events(&self) -> Messages<v1::ContainerEventResponse> {
        let open = Some((self.pods.subscribe(), self.stopping.clone()));
        Box::pin(stream::unfold(open, |open| async move {
            let (mut events, stopping) = open?;
            let answer = next(&mut events, &stopping).await;
            // An error is the last word.
            let open = answer.is_ok().then_some((events, stopping));
            Some((answer, open))
        }))
    }
}

async fn next(
    events: &mut Subscription,
    stopping: &CancellationToken,
) -> Result<v1::ContainerEventResponse, Status> {
    let ending = || Status::unavailable("drupe is stopping: subscribe again");
    tokio::select! {
        () = stopping.cancelled() => Err(ending()),
        told = events.next() => match told {
            Some(Ok(told)) => Ok(event::event(&told)),
            Some(Err(Missed(count))) => Err(Status::data_loss(format!(
                "{count} events were not taken in time: list, and subscribe again"
            ))),
            None => Err(ending()),
        },
    }
}
