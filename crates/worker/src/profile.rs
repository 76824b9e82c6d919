//! Where the time of decode steps and of a prefill goes: a session at a context, and its own stopwatch.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longbit::attention::method;
use longbit::kv::kv_dtype;
use longbit::workload::{HeadShape, MIN_CONTEXT, Workload, WorkloadSpec};
use longbit::{Model, Profile, Session, SessionOptions};
use longbit_sys::{ReadProbe, Team};

use crate::{WorkerError, fill, quality};

/// Decode steps before the first that counts.
const WARMUP_STEPS: usize = 3;
/// Steps after which the cache is rewound, so that the context stays what it is called.
const DRIFT: usize = 64;
/// A prefill is repeated until this much time has passed, and this often at least.
const PREFILL_TIME: Duration = Duration::from_secs(2);
const PREFILL_REPEATS: u64 = 3;
/// Buffer of the read probe: larger than any cache.
const PROBE_BYTES: usize = 1 << 30;

/// What is profiled.
#[derive(Clone, Debug)]
pub struct ProfileOptions {
    /// Tokens in the cache when a step begins.
    pub context: usize,
    /// KV dtype of the cache.
    pub kv: String,
    /// Attention method of the decode steps.
    pub method: String,
    /// Decode steps that count; 0: none.
    pub steps: usize,
    /// Tokens of the prefill; 0: none.
    pub prefill: usize,
}

/// Profiles of a session, with the read bandwidth beside them.
#[derive(Clone, Debug, Default)]
pub struct Profiled {
    /// Read bandwidth with the team before the steps, 10^9 bytes a second.
    pub probe_before_gb_s: f64,
    /// And after them.
    pub probe_after_gb_s: f64,
    /// Decode steps and how many there were.
    pub decode: Option<(Profile, u64)>,
    /// Prefills of [`ProfileOptions::prefill`] tokens, and how many there were.
    pub prefill: Option<(Profile, u64)>,
}

impl ProfileOptions {
    /// Tokens that the session must have room for.
    pub fn capacity(&self) -> usize {
        self.context.saturating_add((DRIFT + WARMUP_STEPS).max(self.prefill))
    }

    /// Bytes beside the model and the cache.
    pub fn scratch_bytes(&self) -> u64 {
        PROBE_BYTES as u64
    }
}

/// Fills the cache of a new session to the context and profiles decode steps and prefills there. The rows are those of
/// the workload `mix`, or of tokens run through the model where the context is too short for it; the queries, keys and
/// values of the profiled steps are the model's own.
///
/// # Errors
/// Names that are not known, memory that is not to be had.
pub fn profile(
    model: Arc<Model>,
    team: Arc<Team>,
    options: &ProfileOptions,
    mut progress: impl FnMut(&str, u64, u64) -> Result<(), WorkerError>,
) -> Result<Profiled, WorkerError> {
    let session_options = SessionOptions {
        capacity: options.capacity(),
        kv: kv_dtype(&options.kv)?,
        method: method(&options.method)?,
    };
    let vocab = model.config.vocab;
    let probe = ReadProbe::new(PROBE_BYTES)?;
    let mut session = Session::new(model, team.clone(), session_options)?;
    fill_to(&mut session, options.context, &mut progress)?;
    let probe_before_gb_s = probe.measure(&team);
    let decode = match options.steps {
        0 => None,
        steps => {
            let decoded = |session: &mut Session, step: usize| {
                if session.len() >= options.context + DRIFT {
                    session.rewind(options.context);
                }
                session.decode(quality::token(step, vocab)).map(|_| ())
            };
            (0..WARMUP_STEPS).try_for_each(|step| decoded(&mut session, step))?;
            session.start_profile();
            for step in 0..steps {
                decoded(&mut session, WARMUP_STEPS + step)?;
                progress("decoding, steps", step as u64 + 1, steps as u64)?;
            }
            let profile = session.take_profile();
            session.rewind(options.context);
            profile.map(|p| (p, steps as u64))
        }
    };
    let prefill = match options.prefill {
        0 => None,
        tokens => {
            let tokens: Vec<u32> = (0..tokens).map(|i| quality::token(i, vocab)).collect();
            session.prefill(&tokens)?;
            session.rewind(options.context);
            session.start_profile();
            let (clock, mut repeats) = (Instant::now(), 0);
            while repeats < PREFILL_REPEATS || clock.elapsed() < PREFILL_TIME {
                session.prefill(&tokens)?;
                session.rewind(options.context);
                repeats += 1;
                progress("prefilling, repetitions", repeats, repeats.max(PREFILL_REPEATS))?;
            }
            session.take_profile().map(|p| (p, repeats))
        }
    };
    let probe_after_gb_s = probe.measure(&team);
    Ok(Profiled { probe_before_gb_s, probe_after_gb_s, decode, prefill })
}

/// Fills the cache to `context` tokens.
pub(crate) fn fill_to(
    session: &mut Session,
    context: usize,
    progress: &mut impl FnMut(&str, u64, u64) -> Result<(), WorkerError>,
) -> Result<(), WorkerError> {
    let config = session.model().config.clone();
    if context >= MIN_CONTEXT {
        let shape = HeadShape {
            layers: config.layers,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            rope_theta: config.rope_theta,
        };
        let workload = Workload::new(&WorkloadSpec::parse("mix")?, &shape, context, 1, 1)?;
        fill::fill(session, fill::Source::Workload(&workload), context, 1, 0, |done, total| {
            progress("filling the cache, heads", done, total)
        })?;
    } else if context > 0 {
        let tokens: Vec<u32> = (0..context).map(|i| quality::token(i, config.vocab)).collect();
        session.prefill(&tokens)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use longbit::{HeadFormat, Op, preset};

    #[test]
    fn steps_are_counted_at_every_context() {
        let team = Arc::new(Team::oversubscribed(2).unwrap());
        let model = Model::synthetic(preset("tiny").unwrap(), HeadFormat::Bf16, 1, &team).unwrap();
        let model = Arc::new(model);
        for context in [0, 5, 100] {
            let options = ProfileOptions {
                context,
                kv: "bf16".into(),
                method: "dense".into(),
                steps: 70,
                prefill: if context == 5 { 0 } else { 33 },
            };
            let found = profile(model.clone(), team.clone(), &options, |_, _, _| Ok(())).unwrap();
            let (decode, steps) = found.decode.unwrap();
            assert_eq!((steps, decode.passes, decode.tokens, decode.threads.len()), (70, 70, 70, 2));
            // Each layer has one call of it a thread and step, and all weights are read once a step.
            let down = decode.total(Op::Down);
            assert_eq!(down.calls, 70 * 2 * 4);
            assert_eq!(down.bytes, 70 * 4 * 256 * 512 / 4);
            assert_eq!(found.prefill.is_some(), context != 5);
            if let Some((prefill, repeats)) = found.prefill {
                assert!(repeats >= PREFILL_REPEATS && prefill.tokens == repeats * 33);
            }
            assert!(found.probe_before_gb_s > 0.0 && found.probe_after_gb_s > 0.0);
        }
        let unknown =
            ProfileOptions { context: 0, kv: "bf61".into(), method: "dense".into(), steps: 1, prefill: 0 };
        assert!(profile(model, team, &unknown, |_, _, _| Ok(())).is_err());
    }
}
