//! Connections of clients that nobody knows: there are only so many places, and
//! whoever takes many of them gives way.
//!
//! When there is no place for one more, the oldest connection goes of the peer
//! that has most. A client comes and says what it wants within milliseconds, so
//! the oldest is one that has nothing to say. Only where all are young, and of
//! the newcomer's own peer, does that one wait: it may be many clients at once.

mod peer;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use peer::Peer;

/// How long a connection is safe from those that its own peer opens later.
const SAFE_FOR: Duration = Duration::from_millis(100);

pub struct Lobby {
    guests: Mutex<Guests>,
    freed: Notify,
}

/// By number, which is the order in which they came.
struct Guests {
    places: usize,
    next: u64,
    here: BTreeMap<u64, Guest>,
}

struct Guest {
    peer: Peer,
    since: Instant,
    leave: CancellationToken,
}

/// What comes of a newcomer.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    ThereIsRoom,
    /// One has been asked to leave, and is about to.
    OneIsLeaving,
    /// This one is to leave.
    Ask(u64),
    /// Nobody can be asked before this.
    NotBefore(Instant),
}

impl Lobby {
    pub fn new(places: usize) -> Self {
        Self {
            guests: Mutex::new(Guests {
                places,
                next: 0,
                here: BTreeMap::new(),
            }),
            freed: Notify::new(),
        }
    }

    /// A place for a connection of `peer`, as soon as there is one. For one
    /// caller at a time.
    pub async fn enter(self: &Arc<Self>, peer: Peer) -> Place {
        loop {
            let freed = self.freed.notified();
            let until = {
                let mut guests = self.guests();
                let now = Instant::now();
                match guests.judge(peer, now) {
                    Verdict::ThereIsRoom => return self.place(&mut guests, peer, now),
                    Verdict::OneIsLeaving => None,
                    Verdict::Ask(number) => {
                        guests.ask_to_leave(number);
                        None
                    }
                    Verdict::NotBefore(until) => Some(until),
                }
            };
            match until {
                None => freed.await,
                Some(until) => drop(tokio::time::timeout_at(until, freed).await),
            }
        }
    }

    fn place(self: &Arc<Self>, guests: &mut Guests, peer: Peer, now: Instant) -> Place {
        let leave = CancellationToken::new();
        Place {
            number: guests.add(peer, now, leave.clone()),
            lobby: Arc::clone(self),
            leave,
        }
    }

    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Held by a connection until it is known, or to its end.
pub struct Place {
    lobby: Arc<Lobby>,
    number: u64,
    leave: CancellationToken,
}

impl Place {
    /// Returns when another connection is to have this place.
    pub async fn is_wanted(&self) {
        self.leave.cancelled().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.lobby.guests().here.remove(&self.number);
        self.lobby.freed.notify_one();
    }
}

impl Guests {
    fn add(&mut self, peer: Peer, since: Instant, leave: CancellationToken) -> u64 {
        let number = self.next;
        self.next += 1;
        self.here.insert(number, Guest { peer, since, leave });
        number
    }

    fn ask_to_leave(&self, number: u64) {
        if let Some(guest) = self.here.get(&number) {
            guest.leave.cancel();
        }
    }

    fn judge(&self, peer: Peer, now: Instant) -> Verdict {
        if self.here.len() < self.places {
            return Verdict::ThereIsRoom;
        }
        if self.here.values().any(|guest| guest.leave.is_cancelled()) {
            return Verdict::OneIsLeaving;
        }
        let mut counts: BTreeMap<Peer, usize> = BTreeMap::new();
        for guest in self.here.values() {
            *counts.entry(guest.peer).or_default() += 1;
        }
        let most = counts.values().max();
        let oldest = self
            .here
            .iter()
            .find(|(_, guest)| counts.get(&guest.peer) == most);
        match oldest {
            None => Verdict::ThereIsRoom,
            Some((_, guest)) if guest.peer == peer && guest.since + SAFE_FOR > now => {
                Verdict::NotBefore(guest.since + SAFE_FOR)
            }
            Some((number, _)) => Verdict::Ask(*number),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLACES: usize = 12;
    const ROOT: Peer = Peer::Uid(0);
    const OTHER: Peer = Peer::Uid(1000);

    fn guests() -> Guests {
        Guests {
            places: PLACES,
            next: 0,
            here: BTreeMap::new(),
        }
    }

    /// Full, with one peer each at the time that is given.
    fn full(of: impl Fn(usize) -> (Peer, Instant)) -> Guests {
        let mut guests = guests();
        for nth in 0..PLACES {
            let (peer, since) = of(nth);
            guests.add(peer, since, CancellationToken::new());
        }
        guests
    }

    #[test]
    fn the_oldest_of_who_has_most_goes() {
        let now = Instant::now();
        let early = now - Duration::from_secs(1);
        // The oldest of all are another's, who has less.
        let guests = full(|nth| (if nth < 5 { ROOT } else { OTHER }, early));
        assert_eq!(guests.judge(ROOT, now), Verdict::Ask(5));
        assert_eq!(guests.judge(OTHER, now), Verdict::Ask(5));
        guests.ask_to_leave(5);
        assert_eq!(guests.judge(ROOT, now), Verdict::OneIsLeaving);
    }

    #[test]
    fn many_clients_of_one_peer_at_once_wait_for_each_other() {
        let now = Instant::now();
        let guests = full(|_| (ROOT, now));
        let later = now + SAFE_FOR;
        assert_eq!(guests.judge(ROOT, now), Verdict::NotBefore(later));
        assert_eq!(guests.judge(ROOT, later), Verdict::Ask(0));
        // They keep nobody else out meanwhile.
        assert_eq!(guests.judge(OTHER, now), Verdict::Ask(0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_is_had_when_the_one_who_was_asked_has_left() {
        let lobby = Arc::new(Lobby::new(PLACES));
        let mut places = Vec::new();
        for _ in 0..PLACES {
            places.push(lobby.enter(OTHER).await);
        }
        let first = places.remove(0);
        let mut entering = std::pin::pin!(lobby.enter(ROOT));
        tokio::select! {
            biased;
            _ = &mut entering => panic!("there is no place"),
            () = first.is_wanted() => {}
        }
        drop(first);
        let _in = entering.await;
        assert_eq!(lobby.guests().here.len(), PLACES);
        // Of one's own there is one place in a while.
        let begun = Instant::now();
        let leaving = async {
            places[0].is_wanted().await;
            drop(places.remove(0));
        };
        let (_in, ()) = tokio::join!(lobby.enter(OTHER), leaving);
        let took = begun.elapsed();
        assert!(SAFE_FOR <= took && took < SAFE_FOR * 2, "{took:?}");
    }

    proptest! {
        /// Whatever comes and goes: there are never too many, and who has less
        /// than another is not asked to leave.
        #[test]
        fn nobody_is_pressed_by_those_who_have_more(
            events in prop::collection::vec((0..6_u32, 0..400_u64), 0..400)
        ) {
            let mut guests = guests();
            let mut now = Instant::now();
            for (who, wait) in events {
                now += Duration::from_millis(wait / 100);
                // Mostly one peer's.
                let peer = Peer::Uid(who.saturating_sub(3));
                match guests.judge(peer, now) {
                    Verdict::ThereIsRoom => {
                        guests.add(peer, now, CancellationToken::new());
                    }
                    Verdict::Ask(number) => {
                        let count = |peer| {
                            guests.here.values().filter(|guest| guest.peer == peer).count()
                        };
                        let asked = guests.here[&number].peer;
                        for uid in 0..3 {
                            prop_assert!(count(asked) >= count(Peer::Uid(uid)));
                        }
                        guests.here.remove(&number);
                        guests.add(peer, now, CancellationToken::new());
                    }
                    Verdict::NotBefore(until) => {
                        prop_assert!(until > now && until - now <= SAFE_FOR);
                        let who_waits = guests.here.values().filter(|guest| guest.peer == peer);
                        prop_assert!(who_waits.count() * 3 >= PLACES);
                    }
                    Verdict::OneIsLeaving => prop_assert!(false, "nobody was asked"),
                }
                prop_assert!(guests.here.len() <= PLACES);
            }
        }
    }
}
