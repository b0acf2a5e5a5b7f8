//! Lists as streams: CRI's Stream* calls answer what the List* calls do, cut
//! into messages that no limit on a message's size is in the way of.

use std::iter::Peekable;
use std::pin::Pin;
use std::vec;

use prost::Message;
use tokio_stream::Stream;
use tonic::{Response, Status};

/// Far below gRPC's usual limit of 4 MiB, and some thousand items of a few
/// hundred bytes each.
const MAX_CHUNK_BYTES: usize = 1 << 20;
/// An item's tag and length, at most.
const FRAME_BYTES: usize = 6;

/// An answer of any number of messages.
pub type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Each message is made when the client takes it.
pub fn stream<Item, Answer>(
    items: Vec<Item>,
    answer: fn(Vec<Item>) -> Answer,
) -> Response<Messages<Answer>>
where
    Item: Message + 'static,
    Answer: 'static,
{
    let chunks = Chunks {
        items: items.into_iter().peekable(),
        max_bytes: MAX_CHUNK_BYTES,
    };
    let answers = chunks.map(move |chunk| Ok(answer(chunk)));
    Response::new(Box::pin(tokio_stream::iter(answers)))
}

/// Never an empty one: CRI wants no message for an empty list. An item larger
/// than a chunk is one by itself.
struct Chunks<Item> {
    items: Peekable<vec::IntoIter<Item>>,
    max_bytes: usize,
}

impl<Item: Message> Iterator for Chunks<Item> {
    type Item = Vec<Item>;

    fn next(&mut self) -> Option<Vec<Item>> {
        let size = |item: &Item| item.encoded_len() + FRAME_BYTES;
        let first = self.items.next()?;
        let mut bytes = size(&first);
        let mut chunk = vec![first];
        while let Some(item) = self
            .items
            .next_if(|item| bytes + size(item) <= self.max_bytes)
        {
            bytes += size(&item);
            chunk.push(item);
        }
        Some(chunk)
    }
}

#[cfg(test)]
mod tests {
    use cri_api::v1;
    use proptest::prelude::*;

    use super::*;

    fn image(size: usize) -> v1::Image {
        v1::Image {
            id: "x".repeat(size),
            ..Default::default()
        }
    }

    proptest! {
        #[test]
        fn every_item_is_in_one_chunk_in_order_and_chunks_are_full(
            sizes in proptest::collection::vec(0_usize..300, 0..60),
            max_bytes in 1_usize..1000,
        ) {
            let items: Vec<_> = sizes.into_iter().map(image).collect();
            let chunks: Vec<_> = Chunks { items: items.clone().into_iter().peekable(), max_bytes }
                .collect();
            let encoded = |images: &[v1::Image]| {
                v1::StreamImagesResponse { images: images.to_vec() }.encoded_len()
            };
            for (i, chunk) in chunks.iter().enumerate() {
                prop_assert!(!chunk.is_empty());
                prop_assert!(chunk.len() == 1 || encoded(chunk) <= max_bytes);
                if let Some(next) = chunks.get(i + 1) {
                    let with_next = [chunk.as_slice(), &next[..1]].concat();
                    prop_assert!(encoded(&with_next) + FRAME_BYTES * with_next.len() > max_bytes);
                }
            }
            prop_assert_eq!(chunks.concat(), items);
        }
    }

    #[tokio::test]
    async fn a_list_larger_than_a_message_comes_in_several() {
        use tokio_stream::StreamExt;
        let images: Vec<_> = (0..5).map(|_| image(MAX_CHUNK_BYTES / 2 - 100)).collect();
        let mut stream = stream(images, |images| v1::StreamImagesResponse { images }).into_inner();
        let mut counts = Vec::new();
        while let Some(answer) = stream.next().await {
            counts.push(answer.unwrap().images.len());
        }
        assert_eq!(counts, [2, 2, 1]);
    }
}
