package main

import (
	"encoding/json"
	"errors"
	"slices"

	"github.com/spf13/cobra"

	"github.com/berth-run/berth/proxy/explain"
)

func explainCommand() *cobra.Command {
	var q explain.Question
	var at, output string
	cmd := &cobra.Command{
		Use:   "explain [TARGET]",
		Short: "Say what becomes of packets to a Service on this node, and why",
		Long: "Say what becomes of packets to a Service on this node, and why: which Service has an address, which endpoints get which share\n" +
			"and why others get none, what is rejected or dropped, whose source is replaced; and what the kernel has, and where that\n" +
			"differs from what it should have. The proxy that runs is asked. Nothing is changed, and no packet is sent.\n\n" +
			"TARGET is ADDRESS:PORT, ADDRESS, :NODEPORT or NAMESPACE/SERVICE[:PORT], with /tcp, /udp or /sctp behind it or without. Without\n" +
			"one it is about all of the node.\n\n" +
			"Exit status: 0 if the kernel has what it should have, 1 if the proxy could not be asked, 2 if the question makes no sense,\n" +
			"3 if the kernel differs, 4 if TARGET is no Service's, 5 if the proxy has not heard from the API server yet, or\n" +
			"programs the kernel for the first time since it was started.",
		Example: "  berth explain 10.96.0.10:53/udp\n" +
			"  berth explain default/web:http --from 10.244.1.7\n" +
			"  berth explain :30080 -o json\n" +
			"  berth explain",
		Args: cobra.MaximumNArgs(1),
	}
	f := cmd.Flags()
	f.StringVar(&q.From, "from", "", "`address` of a client: what becomes of its packets alone, and where session affinity sends it")
	f.StringVar(&at, "socket", explain.Socket, "`path` of the proxy's socket")
	f.StringVarP(&output, "output", "o", asText, "`format`: text or json")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if formats := []string{asText, asJSON}; !slices.Contains(formats, output) {
			return usage("--output: %q is none of text, json", output)
		}
		if len(args) == 1 {
			if q.Target = args[0]; q.Target == "" {
				return usage("TARGET is empty")
			}
		} else if q.From != "" {
			return usage("--from needs a TARGET")
		}
		a, err := explain.Ask(cmd.Context(), at, q)
		if errors.Is(err, explain.ErrQuestion) {
			return usage("%w", err)
		}
		if err != nil {
			return err
		}
		if output == asJSON {
			enc := json.NewEncoder(cmd.OutOrStdout())
			enc.SetIndent("", "  ")
			err = enc.Encode(a)
		} else {
			err = a.Text(cmd.OutOrStdout())
		}
		switch {
		case err != nil:
			return err
		case a.Waiting, a.Loading:
			return &statusError{exitWaiting}
		case len(a.Kernel.Differences) > 0:
			return &statusError{exitDiffers}
		case !a.Found():
			return &statusError{exitNobody}
		}
		return nil
	}
	return cmd
}
