//! A thread that logs leaves its line here and goes on; one thread writes them. A pipe that is not read, a terminal that
//! somebody has stopped, a log driver that hangs: each stops that thread and nothing else. Lines that do not fit any more
//! are dropped and counted.

use std::{
    io::{self, Write},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use super::lines::Lines;

/// Pause after a write, in which lines gather: to wake the writer for each of them would cost those who log more than it
/// costs to write them. As many as may wait do not come in that time.
const GATHER: Duration = Duration::from_millis(2);
/// Pause before what was not taken is offered again.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// Lines between those who log and the one who writes.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// There is something to do for the writer.
    filled: Condvar,
    /// The writer has done all of it.
    done: Condvar,
}

#[derive(Debug)]
struct State {
    waiting: Lines,
    /// The writer has nothing to do and waits; or it has not begun, and there is nothing yet.
    is_done: bool,
    /// Lines that were not written.
    dropped: u64,
    /// How many of them have been told.
    told: u64,
}

/// Lines that were not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dropped {
    /// Since it was last told.
    pub(super) lately: u64,
    /// Since the start.
    pub(super) in_all: u64,
}

impl Queue {
    pub(super) const fn new() -> Queue {
        let state = State { waiting: Lines::new(), is_done: true, dropped: 0, told: 0 };
        Queue { state: Mutex::new(state), filled: Condvar::new(), done: Condvar::new() }
    }

    /// Leaves a line to the writer, or drops it. Never waits for a reader.
    pub(super) fn push(&self, line: &[u8]) {
        self.add(line, Lines::push);
    }

    /// The same for a line that must not be lost to others.
    pub(super) fn push_urgent(&self, line: &[u8]) {
        self.add(line, Lines::push_urgent);
    }

    fn add(&self, line: &[u8], push: fn(&mut Lines, &[u8]) -> bool) {
        let mut state = self.lock();
        if !push(&mut state.waiting, line) {
            state.dropped += 1;
        }
        let was_done = std::mem::replace(&mut state.is_done, false);
        drop(state);
        // A writer that is at work looks again by itself: no system call for those who log.
        if was_done {
            self.filled.notify_one();
        }
    }

    /// How many lines were not written so far.
    pub(super) fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Waits until everything has been written, but not for longer than this. Returns whether it has.
    pub(super) fn flush(&self, patience: Duration) -> bool {
        let waited = self.done.wait_timeout_while(self.lock(), patience, |state| !state.is_done);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.is_done
    }

    /// Writes lines to `sink` as they come, for ever. Once the sink takes lines again after some were dropped, `tell` logs
    /// how many. What the sink refuses with an error is dropped, too.
    pub(super) fn write_to(&self, mut sink: impl Write, tell: impl Fn(Dropped)) -> ! {
        let mut batch = Lines::new();
        let mut is_taken = true;
        loop {
            // Not while the sink refuses everything: this line would be the next that is dropped and has to be told.
            if let Some(dropped) = self.take(&mut batch, is_taken) {
                tell(dropped);
            }
            let mut left = batch.len();
            let outcome = batch.pieces().try_for_each(|piece| {
                write_whole(&mut sink, piece.text)?;
                left -= piece.lines;
                io::Result::Ok(())
            });
            is_taken = outcome.is_ok();
            self.lock().dropped += left as u64;
            batch.clear();
            thread::sleep(GATHER);
        }
    }

    /// Waits for lines and puts them into `batch`, which is empty, in exchange for it. With `may_tell`, returns how many
    /// were dropped if that has not been told.
    fn take(&self, batch: &mut Lines, may_tell: bool) -> Option<Dropped> {
        let mut state = self.lock();
        let untold = |state: &State| may_tell && state.dropped > state.told;
        while state.waiting.is_empty() && !untold(&state) {
            state.is_done = true;
            self.done.notify_all();
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(&mut state.waiting, batch);
        if !untold(&state) {
            return None;
        }
        let dropped = Dropped { lately: state.dropped - state.told, in_all: state.dropped };
        state.told = state.dropped;
        Some(dropped)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under this lock; a poisoned one is as good as any.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As [`Write::write_all`], but a sink that another program has set to `O_NONBLOCK` (they share a terminal or a pipe) is
/// waited for.
fn write_whole(sink: &mut impl Write, mut text: &[u8]) -> io::Result<()> {
    while !text.is_empty() {
        match sink.write(text) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => text = &text[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(BUSY_PAUSE),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, mpsc};

    /// What may take long on a machine that has other things to do.
    const PATIENCE: Duration = Duration::from_secs(30);

    /// A pipe whose reader takes a write when the test asks for it, or whose end is gone.
    struct Pipe(mpsc::SyncSender<Vec<u8>>);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A queue that is written to a pipe without any room of its own; what was dropped is told in the log itself.
    fn queue() -> (Arc<Queue>, mpsc::Receiver<Vec<u8>>) {
        let queue = Arc::new(Queue::new());
        let (to_reader, reader) = mpsc::sync_channel(0);
        let writer = queue.clone();
        thread::spawn(move || {
            writer.write_to(Pipe(to_reader), |Dropped { lately, in_all }| {
                writer.push(format!("dropped {lately} of {in_all}\n").as_bytes());
            })
        });
        (queue, reader)
    }

    fn read(reader: &mpsc::Receiver<Vec<u8>>, until: &str) -> String {
        let mut text = String::new();
        while !text.ends_with(until) {
            text.push_str(std::str::from_utf8(&reader.recv_timeout(PATIENCE).unwrap()).unwrap());
        }
        text
    }

    #[test]
    fn nobody_waits_for_a_reader_and_what_was_dropped_is_told_to_it() {
        let (queue, reader) = queue();
        queue.push(b"0\n");
        while !queue.lock().waiting.is_empty() {
            thread::yield_now();
        }
        // The writer has that one, and stands.
        let mut left = 1_u64;
        while queue.dropped() < 3 {
            queue.push(format!("{left}\n").as_bytes());
            left += 1;
        }
        assert!(!queue.flush(Duration::ZERO));
        queue.push_urgent(b"panicked\n");
        let text = read(&reader, "dropped 3 of 3\n");
        let numbers: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
        assert_eq!(numbers, (0..left - 3).collect::<Vec<_>>());
        assert!(text.ends_with("panicked\ndropped 3 of 3\n"), "{}", &text[text.len() - 100..]);
        queue.push(b"on it goes\n");
        assert_eq!(read(&reader, "goes\n"), "on it goes\n");
        assert!(queue.flush(PATIENCE));
        assert_eq!(queue.dropped(), 3);
    }

    #[test]
    fn a_line_that_is_longer_than_everything_that_may_wait_is_told_too() {
        let (queue, reader) = queue();
        queue.push(&vec![b'x'; super::super::lines::BYTES_MAX + 1]);
        assert_eq!(read(&reader, "\n"), "dropped 1 of 1\n");
    }

    #[test]
    fn what_nothing_takes_is_counted_and_makes_no_noise() {
        let (queue, reader) = queue();
        drop(reader);
        for n in 1..=3 {
            queue.push(b"a line\n");
            assert!(queue.flush(PATIENCE));
            assert_eq!(queue.dropped(), n);
        }
    }

    #[test]
    fn a_sink_that_would_block_is_asked_again() {
        struct Busy(Vec<u8>, bool);
        impl Write for Busy {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.1 = !self.1;
                if self.1 {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                self.0.push(bytes[0]);
                Ok(1)
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut sink = Busy(Vec::new(), false);
        write_whole(&mut sink, b"abc\n").unwrap();
        assert_eq!(sink.0, b"abc\n");
    }
}
