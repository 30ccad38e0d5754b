// Package step runs everything that acquires something (a record, a namespace, a shim, an address, a mount, a cgroup)
// as named steps on one stack, so that failure, removal and recovery after a crash run the same undo in reverse order.
//
// It promises:
//   - a step is noted in the stack's journal before it is done, so that after kill -9 the journal names all that may exist;
//   - every step has a deadline; one that does not return by then is left behind, named in the error, and undone once it
//     returns;
//   - each start and end passes a fail point ("CALL.STEP.before", "CALL.STEP.after", "CALL.STEP.undo-before",
//     "CALL.STEP.undo-after"), at which a test can have the process killed (see [Point]);
//   - each end is told to an observer with its duration, from which logs, metrics and traces come.
//
// It does not promise that an undo runs once: undo functions must be idempotent and work from recorded facts alone,
// since after a crash nobody remembers how far the step had come.
//
//	s := step.Stack{Call: "RunPodSandbox", Owner: id, Save: record.saveSteps}
//	err := s.Run(ctx, namespaces, cgroup)
//	if err == nil {
//		err = s.RunAll(ctx, shim, network) // side by side
//	}
//	if err != nil {
//		return errors.Join(err, s.Unwind(ctx))
//	}
package step
