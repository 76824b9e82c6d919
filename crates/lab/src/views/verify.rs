//! `verify`: quality alone, held against the limits of the experiment.

use std::io::Write;

use longbit_protocol::Quality;

use super::table;
use crate::analyse::label::fixed;
use crate::analyse::verify::verify_violation;
use crate::engine::Engine;
use crate::plan::Plan;
use crate::run::store::{self, Line};
use crate::run::{self, RunOptions};
use crate::{Exit, LabError, Result, machine};

/// `verify`: the quality of every cell against exact attention (or the reference of a text), without timing; 4 when a limit
/// of `[verify]` is violated. The result does not depend on threads, so each cell is taken once, with the most threads there
/// are.
///
/// # Errors
/// As [`crate::run::run`]; [`LabError::Invalid`] when an experiment has no `[verify]`.
pub fn verify(
    engine: &dyn Engine,
    options: &RunOptions,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<Exit> {
    let capabilities = engine.capabilities()?;
    let experiments = run::load_all(&options.files, &capabilities)?;
    let here = options.machine.clone().unwrap_or_else(machine::gather);
    for (experiment, file) in experiments.iter().zip(&options.files) {
        let help = match experiment.text {
            Some(_) => "e.g. [verify] kl_nats_max = 0.01",
            None => "e.g. [verify] cosine_min = 0.99",
        };
        if experiment.verify.is_none() {
            let what = "the experiment limits nothing: it has no [verify]";
            return Err(LabError::invalid(what, file.display().to_string(), help));
        }
    }
    let mut exit = Exit::Ok;
    for experiment in &experiments {
        let mut options = RunOptions { machine: Some(here.clone()), ..options.clone() };
        options.plan.reps = Some(0);
        let counts = experiment.threads.iter().flat_map(|t| t.resolve(here.cpus_allowed));
        if let Some(threads) = counts.filter(|&t| t <= here.cpus_allowed).max()
            && !options.plan.selection.set.iter().any(|s| s.trim_start().starts_with("threads"))
        {
            options.plan.selection.set.push(format!("threads={threads}"));
        }
        let dir =
            tempfile::tempdir().map_err(|e| LabError::io("create a folder in", std::env::temp_dir(), e))?;
        let path = dir.path().join("verify");
        exit = exit.worst(run::measure(engine, &capabilities, experiment, &path, &options, err)?);
        let stored = path.join("plan.json");
        let text = std::fs::read(&stored).map_err(|e| LabError::io("read", &stored, e))?;
        let plan: Plan =
            serde_json::from_slice(&text).map_err(|e| LabError::data(&stored, None, e.to_string()))?;
        verify_table(&plan, &store::read(&path.join("samples.jsonl"))?, out)?;
    }
    out.flush()?;
    Ok(exit)
}

/// A column of the table of `verify`.
type Figure = (&'static str, fn(&Quality) -> Option<f64>);

fn verify_table(plan: &Plan, lines: &[Line], out: &mut dyn Write) -> Result<()> {
    let (mut failed, mut passed, mut missing) = (0, 0, 0);
    let figures: [Figure; 3] = match plan.cells.iter().any(|c| c.text.is_some()) {
        false => [
            ("rel L2 median", |q| q.rel_l2_p50),
            ("rel L2 max", |q| q.rel_l2_max),
            ("cosine min", |q| q.cosine_min),
        ],
        true => [("KL mean", |q| q.kl_nats), ("KL max", |q| q.kl_nats_max), ("top-1", |q| q.top1_agreement)],
    };
    let rows = plan.cells.iter().map(|cell| {
        let quality: Option<&Quality> = lines.iter().find_map(|l| match l {
            Line::Quality { quality } if quality.cell == cell.id => Some(quality.as_ref()),
            _ => None,
        });
        let ended = lines.iter().rev().find_map(|l| match l {
            Line::Failed { outcome } if outcome.cell == cell.id => {
                Some(format!("{}: {}", outcome.status.as_str(), outcome.error))
            }
            _ => None,
        });
        let verdict = match (quality, &cell.skip) {
            (Some(q), _) => {
                match plan.verify.as_ref().and_then(|v| verify_violation(v, &cell.method, Some(q))) {
                    Some(why) => {
                        failed += 1;
                        format!("FAIL: {why}")
                    }
                    None => {
                        passed += 1;
                        "pass".to_owned()
                    }
                }
            }
            (None, Some(skip)) => format!("skipped: {skip}"),
            (None, None) => {
                missing += 1;
                ended.unwrap_or_else(|| "not measured".to_owned())
            }
        };
        let shown = figures
            .iter()
            .map(|(_, figure)| quality.and_then(figure).map(|v| fixed(v, 6)).unwrap_or_default());
        let mut row = vec![cell.context.to_string(), cell.kv_dtype.clone(), cell.method_string()];
        row.extend(shown);
        row.push(verdict);
        row
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let mut header = vec!["context", "kv", "method"];
    header.extend(figures.iter().map(|(name, _)| *name));
    header.push("");
    writeln!(out, "{}\n{}", plan.experiment.full_name(), table(&header, &[0, 3, 4, 5], rows))?;
    writeln!(out, "\n{passed} pass, {failed} fail, {missing} not measured")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{file, here, shown};
    use super::super::{PlanView, plan};
    use super::*;
    use crate::engine::mock::{Fault, MockEngine};

    #[test]
    fn verify_names_the_cell_that_disagrees() {
        let (_dir, path) = file("[verify]\ncosine_min = 0.99");
        let options = RunOptions { files: vec![path], machine: here(), quiet: true, ..RunOptions::default() };
        let verified = |engine: &MockEngine| shown(|out| verify(engine, &options, out, &mut Vec::new()));
        let good = MockEngine::default();
        let (exit, text) = verified(&good);
        assert_eq!(exit, Exit::Ok);
        assert!(text.contains("2 pass, 0 fail") && good.sent.borrow().is_empty(), "{text}");
        let (exit, text) = verified(&MockEngine::with(&[("window", Fault::Cosine(0.5))]));
        assert_eq!(exit, Exit::VerifyFailed);
        assert!(text.contains("FAIL: smallest cosine 0.5 is below 0.99 (verify.cosine_min)"), "{text}");
        let (_dir, bare) = file("");
        let options = RunOptions { files: vec![bare], ..options.clone() };
        assert!(verify(&good, &options, &mut Vec::new(), &mut Vec::new()).is_err());
    }

    #[test]
    fn a_text_is_planned_with_its_prompt_and_verified_by_its_logits() {
        let (dir, path) = file("[verify]\nkl_nats_max = 0.1\ntop1_min = 0.9");
        std::fs::write(dir.path().join("a.txt"), "words").unwrap();
        let text = std::fs::read_to_string(&path).unwrap().replace("preset = \"tiny\"", "path = \"m\"");
        std::fs::write(&path, text.replace("name = \"mix\"", "name = \"text\"\nfile = \"a.txt\"")).unwrap();
        let view = PlanView { files: vec![path.clone()], machine: here(), ..PlanView::default() };
        let (_, text) = shown(|out| plan(&MockEngine::default(), &view, out));
        for part in [
            "prefill",
            "1.02 TMAC",
            "contexts above 8192 tokens (workload.prefill_limit)",
            "2 of 2 cells are beyond the 1000 positions",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let options = RunOptions { files: vec![path], machine: here(), quiet: true, ..RunOptions::default() };
        let verified = |engine: &MockEngine| shown(|out| verify(engine, &options, out, &mut Vec::new()));
        let good = MockEngine::default();
        let (exit, text) = verified(&good);
        assert_eq!(exit, Exit::Ok, "{text}");
        assert!(text.contains("KL mean") && text.contains("top-1") && !text.contains("L2"), "{text}");
        let job = good.jobs.borrow()[0].clone();
        let (asked, model) = (job.text.unwrap().path, job.model.path);
        assert_eq!(asked, dir.path().join("a.txt").to_str().unwrap());
        assert_eq!(model, dir.path().join("m").to_str().unwrap());
        let (exit, text) = verified(&MockEngine::with(&[("window", Fault::Cosine(0.5))]));
        assert_eq!(exit, Exit::VerifyFailed);
        assert!(
            text.contains("FAIL: largest KL divergence 0.5 exceeds 0.1 (verify.kl_nats_max); top-1"),
            "{text}"
        );
    }
}
