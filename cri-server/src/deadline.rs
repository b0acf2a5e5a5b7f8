//! Deadlines of calls (gRPC over HTTP/2, `grpc-timeout`).
//!
//! tonic answers Cancelled when a call's time is up. A client whose own clock
//! is a little behind then sees that instead of DeadlineExceeded, which is what
//! the kubelet and the conformance tests know. So the answer is given here, a
//! moment earlier.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::http::HeaderValue;
use hyper::{Request, Response};
use tonic::Status;
use tower::Service;

/// How much earlier; timers count milliseconds.
const AHEAD: Duration = Duration::from_millis(2);

#[derive(Clone, Debug)]
pub struct Deadlines<S>(pub S);

type Answer<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

impl<S, B, R> Service<Request<B>> for Deadlines<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    R: Default,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = Answer<Response<R>, S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let limit = request.headers().get("grpc-timeout").and_then(parse);
        let work = self.0.call(request);
        Box::pin(async move {
            let Some(limit) = limit else {
                return work.await;
            };
            match tokio::time::timeout(limit.saturating_sub(AHEAD), work).await {
                Ok(answer) => answer,
                Err(_) => {
                    let why = format!("the call was not done within its {limit:?}");
                    Ok(Status::deadline_exceeded(why).into_http())
                }
            }
        })
    }
}

/// At most eight digits and a unit; what is malformed is no deadline.
fn parse(value: &HeaderValue) -> Option<Duration> {
    let (unit, digits) = value.as_bytes().split_last()?;
    let fits = (1..=8).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    let count: u64 = std::str::from_utf8(digits)
        .ok()
        .filter(|_| fits)?
        .parse()
        .ok()?;
    match unit {
        b'H' => Some(Duration::from_secs(count * 3600)),
        b'M' => Some(Duration::from_secs(count * 60)),
        b'S' => Some(Duration::from_secs(count)),
        b'm' => Some(Duration::from_millis(count)),
        b'u' => Some(Duration::from_micros(count)),
        b'n' => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tonic::Code;
    use tower::service_fn;

    use super::*;

    #[test]
    fn deadlines_are_read_as_the_protocol_writes_them() {
        let read = |text: &str| parse(&HeaderValue::from_str(text).unwrap());
        assert_eq!(read("1m"), Some(Duration::from_millis(1)));
        assert_eq!(
            read("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        assert_eq!(read("2M"), Some(Duration::from_secs(120)));
        for bad in ["", "1", "m", "100000000S", "-1S", "1s", "1.5S"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_late_has_exceeded_its_deadline() {
        let code = |limit: &'static str, takes: Duration| async move {
            let work = service_fn(move |_: Request<()>| async move {
                tokio::time::sleep(takes).await;
                Ok::<_, Infallible>(Response::new(String::new()))
            });
            let mut request = Request::new(());
            let limit = HeaderValue::from_static(limit);
            request.headers_mut().insert("grpc-timeout", limit);
            let answer = Deadlines(work).call(request).await.unwrap();
            Status::from_header_map(answer.headers()).map(|status| status.code())
        };
        let second = Duration::from_secs(1);
        assert_eq!(code("2S", second).await, None);
        assert_eq!(code("1S", 2 * second).await, Some(Code::DeadlineExceeded));
        assert_eq!(code("1m", second).await, Some(Code::DeadlineExceeded));
    }
}
