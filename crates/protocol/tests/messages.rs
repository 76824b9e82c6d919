//! The messages are the contract with other engines: they survive the trip through JSON, on one line, and a request with
//! an unknown field is refused instead of half understood.

use longbit_protocol::{
    CellJob, Event, Job, Limits, Measure, ModelSpec, PROTOCOL, Quality, Reads, Request, Sample, SeedSpread,
    Status, TextFile, TraceFile, Traffic,
};

fn job() -> Job {
    Job {
        protocol: PROTOCOL,
        model: ModelSpec { preset: "tiny".into(), head: "bf16".into(), seed: 1, ..ModelSpec::default() },
        context: 4096,
        kv_dtype: "bf16".into(),
        workload: "mix:eta=1".into(),
        text: Some(TextFile { path: "a.txt".into(), sha256: "ab".repeat(32) }),
        trace: Some(TraceFile { path: "a.safetensors".into(), sha256: "cd".repeat(32) }),
        seed: u64::MAX,
        cells: Vec::new(),
        measure: Measure {
            reps: 6,
            gen_tokens: 50,
            warmup_tokens: 2,
            quality_steps: 4,
            seeds: 1,
            pin: true,
            probe_bytes: 1 << 30,
        },
        limits: Limits { address_space_bytes: None },
    }
}

#[test]
fn requests_and_events_survive_json_on_one_line() {
    for request in [
        Request::Capabilities,
        Request::Probe { threads: vec![1, 2], bytes: 9 },
        Request::Measure(Box::new(job())),
    ] {
        let line = serde_json::to_string(&request).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
    }
    let sample = Sample {
        cell: "a\nb".into(),
        tok_ns: vec![1, u64::MAX],
        traffic: Traffic { kv_bytes: 3, index_bytes: 0, rows: 7 },
        khz: Some((1, 2)),
        steal_pct: Some(0.1),
        ..Sample::default()
    };
    let quality = Quality { rel_l2_p50: Some(1.0 / 3.0), needle_accuracy: None, ..Quality::default() };
    for event in [Event::Sample(Box::new(sample)), Event::Quality(Box::new(quality)), Event::End] {
        let line = serde_json::to_string(&event).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
    }
}

#[test]
fn an_unknown_field_of_a_request_is_refused() {
    let mut value = serde_json::to_value(Request::Measure(Box::new(job()))).unwrap();
    value["measure"]["repz"] = 3.into();
    let message = serde_json::from_value::<Request>(value).unwrap_err().to_string();
    assert!(message.contains("repz"), "{message}");
}

#[test]
fn status_words_are_the_ones_that_are_serialised() {
    for status in [
        Status::Ok,
        Status::Skipped,
        Status::Timeout,
        Status::Oom,
        Status::VerifyFailed,
        Status::Unstable,
        Status::Error,
    ] {
        assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
    }
}

#[test]
fn a_model_without_further_wishes_is_written_as_ever() {
    // Identities of cells are hashes of this text.
    assert_eq!(
        serde_json::to_string(&job().model).unwrap(),
        r#"{"preset":"tiny","path":"","head":"bf16","seed":1}"#
    );
}

#[test]
fn quality_of_before_logits_were_compared_is_read() {
    let old = r#"{"cell":"c","steps":4,"outputs":8,"rel_l2_p50":0.1,"rel_l2_p95":0.2,"rel_l2_max":0.3,
        "cosine_mean":0.9,"cosine_min":0.8,"top1_agreement":null,"kl_nats":null}"#;
    let quality: Quality = serde_json::from_str(old).unwrap();
    assert_eq!((quality.rel_l2_max, quality.cosine_min), (Some(0.3), Some(0.8)));
    assert_eq!((quality.kl_nats, quality.kl_nats_max, quality.nll_nats), (None, None, None));
}

#[test]
fn one_seed_is_not_written_and_not_needed() {
    // Hashes of plans are over this text.
    let measure = job().measure;
    let text = serde_json::to_string(&measure).unwrap();
    assert!(!text.contains("seeds"), "{text}");
    assert_eq!(serde_json::from_str::<Measure>(&text).unwrap(), measure);
    let text = serde_json::to_string(&Measure { seeds: 5, ..measure }).unwrap();
    assert_eq!(serde_json::from_str::<Measure>(&text).unwrap().seeds, 5);
    let spread = SeedSpread { count: 5, rel_l2_mean: 0.5, rel_l2_sd: 0.1 };
    let reads = Reads { samples: 3, captured_mass_p50: 0.9, ..Reads::default() };
    let quality = Quality { reads: Some(reads), seeds: Some(spread), ..Quality::default() };
    let text = serde_json::to_string(&quality).unwrap();
    assert_eq!(serde_json::from_str::<Quality>(&text).unwrap(), quality);
    assert!(!serde_json::to_string(&Quality::default()).unwrap().contains("reads"));
}

#[test]
fn a_batch_of_one_is_not_written_and_not_needed() {
    let cell = CellJob { id: "c".into(), batch: 1, ..serde_json::from_str(CELL).unwrap() };
    assert!(!serde_json::to_string(&cell).unwrap().contains("batch"));
    let cell = CellJob { batch: 32, ..cell };
    let text = serde_json::to_string(&cell).unwrap();
    assert!(text.contains("\"batch\":32"));
    assert_eq!(serde_json::from_str::<CellJob>(&text).unwrap(), cell);
    assert_eq!(serde_json::from_str::<CellJob>(CELL).unwrap().batch, 1);
}

const CELL: &str = r#"{"id":"c","threads":2,"method":"dense"}"#;

#[test]
fn a_repetition_has_as_many_passes_as_hold_its_tokens() {
    let measure = job().measure;
    let passes = [1, 2, 32, 50, 384].map(|batch| measure.passes(batch));
    assert_eq!(passes, [(2, 50), (1, 25), (1, 2), (1, 1), (1, 1)]);
}
