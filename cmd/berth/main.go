// Command berth is a container runtime for Kubernetes: `berth serve` answers the kubelet.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
)

func main() {
	if err := command().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "berth:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "berth",
		Short:         "A container runtime for Kubernetes",
		SilenceUsage:  true,
		SilenceErrors: true, // main says them, once
	}
	root.AddCommand(serveCommand(), versionCommand())
	return root
}
