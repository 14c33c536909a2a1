//! The thread that talks to bundle endpoints. What it reads comes from elsewhere, and is judged
//! before anybody is authenticated: so it has no capability and writes no file.

use std::{sync::OnceLock, thread};

use tokio::{
    runtime::Builder,
    sync::{mpsc, oneshot},
};

use super::{
    EndpointError,
    fetch::{Fetched, Question, fetch},
};
use crate::privileges::Confinement;

type Answer = Result<Fetched, EndpointError>;
type Job = (Question, oneshot::Sender<Answer>);

/// The thread's other end. It is started with the first question.
#[derive(Debug)]
pub(super) struct Fetcher {
    confinement: Confinement,
    jobs: OnceLock<mpsc::UnboundedSender<Job>>,
}

impl Fetcher {
    pub(super) fn new(confinement: Confinement) -> Self {
        Self {
            confinement,
            jobs: OnceLock::new(),
        }
    }

    /// Fetches a bundle there.
    pub(super) async fn fetch(&self, question: Question) -> Answer {
        let gone = || EndpointError::Unreachable("the thread that fetches has ended".into());
        let (answer, wait) = oneshot::channel();
        let jobs = self.jobs.get_or_init(|| start(self.confinement));
        jobs.send((question, answer)).map_err(|_| gone())?;
        wait.await.map_err(|_| gone())?
    }
}

fn start(confinement: Confinement) -> mpsc::UnboundedSender<Job> {
    // As many wait as there are endpoints: each asks again only when it was answered.
    let (jobs, inbox) = mpsc::unbounded_channel();
    let run = move || {
        // Before the runtime has threads of its own, which look up names.
        if let Err(error) = confinement.enter_fetching() {
            tracing::error!(%error, "bundle endpoints are not asked");
            return;
        }
        match Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime.block_on(answer(inbox)),
            Err(error) => tracing::error!(%error, "bundle endpoints are not asked"),
        }
    };
    if let Err(error) = thread::Builder::new().name("bundles".into()).spawn(run) {
        tracing::error!(%error, "bundle endpoints are not asked: there can be no more threads");
    }
    jobs
}

async fn answer(mut inbox: mpsc::UnboundedReceiver<Job>) {
    while let Some((question, answer)) = inbox.recv().await {
        tokio::spawn(async move {
            // Whoever asked may not follow the endpoint any more.
            let _ = answer.send(fetch(question).await);
        });
    }
}
