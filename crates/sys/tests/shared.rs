//! Shared buffers: stripes, and the claims that may and may not stand together.

use longbit_sys::{Shared, SysError, Team, share};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The message of the conflict that `f` runs into.
fn conflict(f: impl FnOnce()) -> String {
    let payload = catch_unwind(AssertUnwindSafe(f)).expect_err("a conflict was due");
    payload.downcast::<String>().map_or("not a text".to_owned(), |text| *text)
}

#[test]
fn buffers_are_filled_aligned_and_cut_as_asked() {
    let even = Shared::even(7, 10, 3, 2.5f32);
    assert_eq!((even.len(), even.stripes(), even.name()), (70, 3, "unnamed"));
    for part in 0..3 {
        let units = share(7, part, 3);
        assert_eq!(even.stripe_range(part), units.start * 10..units.end * 10);
    }
    assert_eq!(*even.read(), [2.5; 70]);
    assert_eq!(even.read().as_ptr() as usize % 64, 0);
    let striped = Shared::striped(9, &[0, 4, 4, 9], 1u8);
    assert_eq!([striped.write(0).len(), striped.write(1).len(), striped.write(2).len()], [4, 0, 5]);
    let mut one = Shared::new(5, 0i32);
    assert_eq!((one.stripes(), one.is_empty()), (1, false));
    one.as_mut_slice()[4] = 7;
    assert_eq!(*one.read(), [0, 0, 0, 0, 7]);
    assert_eq!(Shared::even(2, 3, 5, 0u16).stripes(), 5, "more parts than units leave empty stripes");
    assert!(Shared::new(0, 0u64).read().is_empty());
    assert_eq!(Shared::new(3, ()).write_all().len(), 3);
}

#[test]
fn bounds_and_sizes_that_cannot_be_are_errors() {
    for bounds in [&[][..], &[0], &[1, 8], &[0, 9], &[0, 5, 3, 8]] {
        let error = Shared::try_striped(8, bounds, 0u8).expect_err("bad bounds");
        assert!(matches!(error, SysError::Bounds { len: 8, .. }), "{error}");
    }
    let huge = usize::MAX / 2;
    assert!(matches!(Shared::try_striped(huge, &[0, huge], 0u64), Err(SysError::TooLarge { .. })));
    let refused = isize::MAX as usize - 4096;
    assert!(matches!(Shared::try_striped(refused, &[0, refused], 0u8), Err(SysError::Memory { .. })));
}

#[test]
fn claims_that_do_not_touch_each_other_stand_together() {
    let buffer = Shared::even(4, 8, 4, 0u32);
    {
        let mut first = buffer.write(0);
        let mut last = buffer.write_many(2..4);
        first.fill(1);
        last.fill(3);
        assert_eq!(*buffer.read_range(8..16), [0; 8]);
        assert_eq!(buffer.read_range(16..16).len(), 0, "an empty range touches nothing");
    }
    let (whole, part, again) = (buffer.read(), buffer.read_range(5..11), buffer.read());
    assert_eq!((whole[0], &part[..], again[31]), (1, &[1, 1, 1, 0, 0, 0][..], 3));
    drop((whole, part, again));
    buffer.write_all().fill(9);
    assert_eq!(*buffer.read(), [9; 32]);
}

#[test]
fn conflicting_claims_panic_with_name_and_stripe_and_leave_no_trace() {
    let buffer = Shared::even(3, 4, 3, 0u8).named("ffn.gate");
    let writing = buffer.write(1);
    for message in [
        conflict(|| drop(buffer.write(1))),
        conflict(|| drop(buffer.write_all())),
        conflict(|| drop(buffer.write_many(0..2))),
        conflict(|| drop(buffer.read())),
        conflict(|| drop(buffer.read_range(3..5))),
        conflict(|| drop(buffer.read_stripe(1))),
    ] {
        assert!(message.contains("\"ffn.gate\"") && message.contains("stripe 1 of 3"), "{message}");
    }
    assert_eq!(*buffer.read_range(0..4), [0; 4], "refused claims released what they had");
    drop((buffer.write(0), buffer.write(2)));
    drop(writing);

    let reading = buffer.read();
    assert!(conflict(|| drop(buffer.write(2))).contains("claimed to write"));
    drop(reading);
    let reading = buffer.read_range(0..5);
    assert!(conflict(|| drop(buffer.write(1))).contains("stripe 1"));
    drop(buffer.write(2));
    drop(reading);
    buffer.write_all().fill(1);
}

#[test]
fn claims_out_of_the_buffer_are_refused() {
    let buffer = Shared::even(2, 4, 2, 0u8).named("small");
    assert!(conflict(|| drop(buffer.write(2))).contains("no stripes"));
    assert!(conflict(|| drop(buffer.read_range(7..9))).contains("leaves buffer"));
    drop(buffer.write_all());
}

#[test]
fn a_missing_barrier_is_caught_in_the_team() {
    let team = Team::oversubscribed(2).expect("threads");
    let buffer = Shared::even(2, 4, 2, 0u8).named("logits");
    // Worker 1 holds its stripe over the barrier: worker 0 must not read.
    let message = conflict(|| {
        team.run(|worker| {
            let guard = (worker.index() == 1).then(|| buffer.write(1));
            worker.barrier();
            if worker.index() == 0 {
                drop(buffer.read());
            }
            worker.barrier();
            drop(guard);
        });
    });
    assert!(message.contains("\"logits\""), "{message}");
    assert_eq!(*buffer.read(), [0; 8], "unwinding gave the claims back");
}
