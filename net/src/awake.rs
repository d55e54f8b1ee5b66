//! prototype
use std::{cell::Cell, time::{Duration, Instant}};
use tokio::sync::Notify;

thread_local! { static LAST: Cell<Option<Instant>> = const { Cell::new(None) }; static WOKEN: std::rc::Rc<Notify> = std::rc::Rc::new(Notify::new()); static ASLEEP: Cell<bool> = const { Cell::new(true) }; }
pub fn active() { LAST.set(Some(Instant::now())); if ASLEEP.get() { BELL.with(|b| match &*b.borrow() { Some(b) => b.notify_one(), None => WOKEN.with(|w| w.notify_one()) }) } }
pub fn window() -> Duration { Duration::from_micros(std::env::var("PELTON_SPIN_US").ok().and_then(|v| v.parse().ok()).unwrap_or(0)) }
pub fn set_bell(n: std::sync::Arc<Notify>) { BELL.with(|b| *b.borrow_mut() = Some(n)); }
thread_local! { static BELL: std::cell::RefCell<Option<std::sync::Arc<Notify>>> = const { std::cell::RefCell::new(None) }; static W: Cell<Option<Duration>> = const { Cell::new(None) }; }
pub fn recent() -> bool { let w = W.get().unwrap_or_else(|| { let w = window(); W.set(Some(w)); w }); let r = LAST.get().is_some_and(|l| l.elapsed() < w); ASLEEP.set(!r); r }
pub async fn stay(mut poll: impl FnMut()) {
    let window = window();
    if window.is_zero() { std::future::pending::<()>().await; }
    let woken = WOKEN.with(std::rc::Rc::clone);
    loop {
        ASLEEP.set(true);
        woken.notified().await;
        ASLEEP.set(false);
        while LAST.get().is_some_and(|l| l.elapsed() < window) {
            poll();
            tokio::task::yield_now().await;
            std::thread::yield_now();
        }
    }
}
