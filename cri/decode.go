package cri

import (
	"context"
	"fmt"
	"log/slog"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// strict is a service whose unary calls answer a request that is no such message (text that is not UTF-8, bytes that are
// no fields) with InvalidArgument and the name of the field. gRPC itself says Internal, as if that were berth's fault, and
// calls no interceptor.
func strict(service grpc.ServiceDesc, log *slog.Logger) *grpc.ServiceDesc {
	methods := make([]grpc.MethodDesc, len(service.Methods))
	for i, m := range service.Methods {
		handle := m.Handler
		m.Handler = func(srv any, ctx context.Context, decode func(any) error, around grpc.UnaryServerInterceptor) (any, error) {
			return handle(srv, ctx, func(req any) error {
				err := decode(req)
				if err == nil {
					return nil
				}
				text := brief(fmt.Sprintf("request of %s: %s", m.MethodName, status.Convert(err).Message()), maxText)
				log.Info("a request cannot be read", "call", m.MethodName, "err", text)
				return status.Error(codes.InvalidArgument, text)
			}, around)
		}
		methods[i] = m
	}
	service.Methods = methods
	return &service
}
