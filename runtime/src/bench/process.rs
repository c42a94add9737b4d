//! One measuring process: started, spoken to line by line, and ended.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::host::{Asked, BenchError};
use super::job::{Answer, Expected, Finished, RunTime};
use super::size::Pixels;
use super::{Observer, Plan};

/// A measuring process.
pub(super) struct Worker<'a> {
    model: PathBuf,
    size: Asked,
    process: Process,
    /// `None` once the worker was told to finish.
    requests: Option<ChildStdin>,
    answers: Receiver<io::Result<String>>,
    observer: &'a dyn Observer,
}

/// Ends the process when it is dropped, however that comes.
struct Process {
    child: Child,
    /// How long it may take to remove its temporary files.
    patience: Duration,
}

/// For most.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often somebody looks whether a process has ended, or is to be.
const LOOK: Duration = Duration::from_millis(20);

impl Drop for Process {
    fn drop(&mut self) {
        // Signals fail only if the process is gone already.
        let is_there = |child: &mut Child| matches!(child.try_wait(), Ok(None));
        if is_there(&mut self.child) {
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
            let asked = Instant::now();
            while is_there(&mut self.child) && asked.elapsed() < self.patience {
                thread::sleep(LOOK);
            }
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

/// The lines of a process, as they come, so that whoever waits for one can look up meanwhile.
fn lines(from: ChildStdout) -> io::Result<Receiver<io::Result<String>>> {
    let (sender, lines) = channel();
    thread::Builder::new()
        .name("answers".to_owned())
        .spawn(move || {
            for line in BufReader::new(from).lines() {
                if sender.send(line).is_err() {
                    break;
                }
            }
        })?;
    Ok(lines)
}

impl<'a> Worker<'a> {
    pub fn start(
        plan: &Plan,
        model: &Path,
        size: Asked,
        observer: &'a dyn Observer,
    ) -> Result<Self, BenchError> {
        let died = |source| BenchError::Worker {
            model: model.to_owned(),
            size,
            source,
        };
        if observer.stopped() {
            return Err(BenchError::Stopped);
        }
        let mut job = plan.template.clone();
        job.model = model.to_owned();
        job.side = size.0;
        let job = serde_json::to_string(&job).map_err(|e| died(e.into()))?;
        let mut child = Command::new(&plan.worker.program)
            .args(&plan.worker.arguments)
            .args([std::process::id().to_string(), job])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C is for this process, which ends its workers; they have nothing to say of it.
            .process_group(0)
            .spawn()
            .map_err(died)?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let process = Process {
            child,
            patience: PATIENCE,
        };
        let (requests, answers) =
            pipes.ok_or_else(|| died(std::io::Error::other("it has no pipes")))?;
        let answers = lines(answers).map_err(died)?;
        Ok(Self {
            model: model.to_owned(),
            size,
            process,
            requests: Some(requests),
            answers,
            observer,
        })
    }

    pub fn counted(&mut self) -> Result<(Expected, Option<Pixels>), BenchError> {
        match self.answer()? {
            Answer::Counted(expected, pixels) => Ok((expected, pixels)),
            other => Err(self.unexpected(&other)),
        }
    }

    pub fn ready(&mut self) -> Result<(), BenchError> {
        match self.answer()? {
            Answer::Ready => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    pub fn run(&mut self) -> Result<RunTime, BenchError> {
        if self.observer.stopped() {
            return Err(BenchError::Stopped);
        }
        let sent = match &mut self.requests {
            Some(requests) => requests.write_all(b"\n").and_then(|()| requests.flush()),
            None => Err(std::io::Error::other("it was told to finish")),
        };
        match (self.answer()?, sent) {
            (Answer::Ran(run), Ok(())) => Ok(run),
            // Where the process is gone, its answer has said how it ended.
            (_, Err(e)) => Err(self.died(e)),
            (other, Ok(())) => Err(self.unexpected(&other)),
        }
    }

    pub fn finish(mut self) -> Result<Finished, BenchError> {
        self.requests = None;
        let finished = match self.answer()? {
            Answer::Done(finished) => finished,
            other => return Err(self.unexpected(&other)),
        };
        // It has said all that it has to say; one that hangs while it ends is ended.
        Ok(finished)
    }

    fn answer(&mut self) -> Result<Answer, BenchError> {
        let line = match self.line()? {
            Some(line) => line.map_err(|e| self.died(e))?,
            None => {
                let status = self.process.child.wait().map_err(|e| self.died(e))?;
                let why = match std::os::unix::process::ExitStatusExt::signal(&status) {
                    Some(9) => {
                        "it was killed, which is how a system short of memory ends a process"
                            .to_owned()
                    }
                    _ => format!("it ended with {status}"),
                };
                return Err(self.died(std::io::Error::other(why)));
            }
        };
        match serde_json::from_str(&line) {
            Ok(Answer::Failed(message, fault)) => Err(BenchError::Failed {
                model: self.model.clone(),
                size: self.size,
                message,
                fault,
            }),
            Ok(answer) => Ok(answer),
            Err(e) => Err(self.died(e.into())),
        }
    }

    /// The next line; `None` after the last.
    fn line(&self) -> Result<Option<io::Result<String>>, BenchError> {
        loop {
            if self.observer.stopped() {
                return Err(BenchError::Stopped);
            }
            match self.answers.recv_timeout(LOOK) {
                Ok(line) => return Ok(Some(line)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn unexpected(&self, answer: &Answer) -> BenchError {
        self.died(std::io::Error::other(format!("it answered {answer:?}")))
    }

    fn died(&self, source: std::io::Error) -> BenchError {
        BenchError::Worker {
            model: self.model.clone(),
            size: self.size,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_will_not_end_is_ended() {
        let mut child = Command::new("sh")
            .args(["-c", "trap '' TERM; echo deaf; exec sleep 1000000"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = lines(child.stdout.take().unwrap()).unwrap();
        assert_eq!(lines.recv().unwrap().unwrap(), "deaf");
        drop(Process {
            child,
            patience: Duration::from_millis(50),
        });
        // Its end of the pipe is closed.
        assert!(lines.recv().is_err());
    }
}
