//! Whose pod it was that ended the daemon.
//!
//! A panic ends the daemon, so that it never only looks alive; it is started
//! again and takes its pods up. If a pod's own state is what it panics over,
//! that would go on for as long as the pod is there, and no pod of the node
//! would be served. So all that is done for a pod runs in its [`Scope`]
//! ([`in_scope`]); the panic hook notes the pod ([`note_panic`]) in a file, the
//! [`Ledger`], and who has ended the daemon too often is not served any more:
//!
//! ```text
//! ends    a pod that was ready   any other pod        a pod to be started
//! 0, 1    taken up               finished or undone   started
//! 2, 3    shown as failed        finished or undone   refused
//! 4 ...   shown as failed        left as it is        refused
//! ```
//! A pod is meant by its name and uid in Kubernetes: the kubelet puts a new
//! sandbox in the place of one that failed.

mod ledger;

use std::cell::RefCell;
use std::fs::File;
use std::future::poll_fn;
use std::io::Write;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;

use hyper::rt::Executor as Execute;
use tokio::task::JoinHandle;

pub(crate) use ledger::{Ledger, Posture};

thread_local! {
    static CURRENT: RefCell<Option<Scope>> = const { RefCell::new(None) };
}

/// The pod for which something is done.
#[derive(Clone, Debug)]
pub struct Scope(Arc<Noted>);

#[derive(Debug)]
struct Noted {
    ledger: Box<Path>,
    line: Box<str>,
}

impl Scope {
    fn new(ledger: &Path, line: String) -> Self {
        Self(Arc::new(Noted {
            ledger: ledger.into(),
            line: line.into(),
        }))
    }
}

/// Notes the pod that the panicking thread was at work for. To be called by a
/// panic hook before it ends the process.
pub fn note_panic() {
    let taken = CURRENT.try_with(|current| current.try_borrow_mut().ok()?.take());
    let Ok(Some(Scope(noted))) = taken else {
        return;
    };
    // The process is about to end: what was written by then stays.
    let file = File::options()
        .append(true)
        .create(true)
        .open(&noted.ledger);
    let written = file.and_then(|mut file| file.write_all(noted.line.as_bytes()));
    if let Err(error) = written {
        eprintln!("cannot note a panic in {:?}: {error}", noted.ledger);
    }
}

/// Polls `future` in the scope.
pub(crate) async fn in_scope<F: Future>(scope: Option<Scope>, future: F) -> F::Output {
    let mut future = pin!(future);
    poll_fn(move |context| within(&scope, || future.as_mut().poll(context))).await
}

fn within<T>(scope: &Option<Scope>, work: impl FnOnce() -> T) -> T {
    let _outer = Outer(CURRENT.replace(scope.clone()));
    work()
}

/// The scope that is left and come back to.
struct Outer(Option<Scope>);

impl Drop for Outer {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

/// A task that is done for the pod for which this one is.
pub(crate) fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(in_scope(here(), future))
}

/// The same on a thread for what blocks.
pub(crate) fn spawn_blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    let scope = here();
    tokio::task::spawn_blocking(move || within(&scope, work))
}

fn here() -> Option<Scope> {
    CURRENT.with_borrow(Option::clone)
}

/// Runs the tasks of a connection to a pod's agent.
#[derive(Clone, Debug)]
pub(crate) struct Executor(pub(crate) Option<Scope>);

impl<F> Execute<F> for Executor
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        tokio::spawn(in_scope(self.0.clone(), future));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> Option<String> {
        here().map(|scope| scope.0.line.to_string())
    }

    #[tokio::test]
    async fn what_a_pods_task_begins_is_the_pods_and_nothing_else_is() {
        let scope = |line: &str| Some(Scope::new(Path::new("/nonexistent"), line.to_owned()));
        let of_a = in_scope(scope("a"), async {
            tokio::task::yield_now().await;
            let task = spawn(async {
                tokio::task::yield_now().await;
                (line(), spawn_blocking(line).await.unwrap())
            });
            (line(), task.await.unwrap())
        });
        let of_b = in_scope(scope("b"), async {
            tokio::task::yield_now().await;
            line()
        });
        let (a, b) = tokio::join!(of_a, of_b);
        let is = |line: &str| Some(line.to_owned());
        assert_eq!(a, (is("a"), (is("a"), is("a"))));
        assert_eq!(b, is("b"));
        assert_eq!(line(), None);
    }
}
